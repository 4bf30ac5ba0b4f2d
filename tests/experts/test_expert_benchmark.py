"""The benchmark of a block of experts: what it measures is right, and what it counts holds on a small block."""

import dataclasses
import re

import pytest
import torch

from benchmarks.experts import __main__ as command
from benchmarks.experts.methods import METHODS, Shape
from benchmarks.measure.rows import RESULTS, read_rows
from benchmarks.report import expert_tables
from genft_kernels.experts import update
from genft_kernels.experts.layer import GenFTExperts

pytest.importorskip("peft")
pytest.importorskip("transformers")

SMALL = Shape(hidden=64, inner=96, experts=4, tokens=40)


BY_NAME = {method.name: method for method in METHODS}


def rows_of(dtype_name="float32", k=8, methods=METHODS):
    return {row["method"]: row for row in command.run(methods, SMALL, dtype_name, k, turns=1)}


def spoilt(name, spoil):
    """A method whose adapted block `spoil` gets."""

    def adapt(block, k):
        adapted = BY_NAME[name].adapt(block, k)
        spoil(adapted)
        return adapted

    return dataclasses.replace(BY_NAME[name], name="spoilt", adapt=adapt)


@pytest.fixture(scope="module")
def rows():
    return rows_of()


def test_every_method_is_measured_beside_lora(rows):
    assert set(rows) == {method.name for method in METHODS}
    assert all(row["process_ms"] > 0 and row["ratio_lora-grouped"] > 0 for row in rows.values())
    assert rows["lora-eager"]["ratio_lora-eager"] == 1


def test_every_method_passes_its_gate_in_16_bits():
    assert {row["status"] for row in rows_of("bfloat16").values()} == {"measured"}


@pytest.mark.parametrize("name", ["genft-fast", "lora-grouped", "frozen"])
def test_a_wrong_output_is_not_timed(name):
    wrong = spoilt(name, lambda block: block.register_forward_hook(lambda *call: 1.01 * call[-1]))
    rows = rows_of(methods=[wrong, BY_NAME["genft-fast"]])
    assert rows["spoilt"]["status"] == "wrong" and rows["spoilt"]["reason"].startswith("y is off by 0.01 of its norm")
    assert "process_ms" not in rows["spoilt"] and rows["genft-fast"]["status"] == "measured"


@pytest.mark.parametrize("name", ["genft-fast", "lora-eager"])
def test_a_wrong_gradient_is_not_timed(name):
    def spoil(block):
        *_, last = (parameter for parameter in block.parameters() if parameter.requires_grad)
        last.register_hook(lambda grad: 1.01 * grad)

    (row,) = rows_of(methods=[spoilt(name, spoil)]).values()
    assert row["status"] == "wrong" and re.match(r"d\S+\.\S+ is off by 0.01 of its norm", row["reason"])


def test_experts_without_their_update_are_not_timed(monkeypatch):
    product = update.expert_product

    def without(x, offsets, weight, bias, factors, *rest):
        return product(x, offsets, weight, bias) + 0 * (factors.h.sum() + factors.b.sum())

    monkeypatch.setattr(update, "expert_product", without)
    assert {name: row["status"] for name, row in rows_of().items()} == {
        name: "wrong" if name.startswith("genft") else "measured" for name in BY_NAME
    }


def no_kernel(block, *k):
    raise RuntimeError("no such kernel")


def test_a_method_that_cannot_be_built_does_not_end_the_run():
    rows = rows_of(methods=[dataclasses.replace(BY_NAME["lora-grouped"], adapt=no_kernel), BY_NAME["genft-fast"]])
    failed, measured = rows["lora-grouped"], rows["genft-fast"]
    assert (failed["status"], failed["reason"]) == ("failed", "RuntimeError: no such kernel")
    assert measured["process_ms"] > 0 and "ratio_lora-grouped" not in measured
    section = expert_tables.section(list(rows.values()))
    assert "#### Not timed\n\n- lora-grouped: failed: RuntimeError: no such kernel\n" in section
    assert "| genft-fast |" in section and "| lora-grouped |" not in section
    (alone,) = rows_of(methods=[dataclasses.replace(BY_NAME["frozen"], adapt=no_kernel)]).values()
    assert "no such kernel" in expert_tables.section([alone])


def test_rows_of_before_there_was_a_gate_are_shown():
    (path,) = RESULTS.glob("*/experts.jsonl")
    section = expert_tables.section([{name: row[name] for name in row if name != "status"} for row in read_rows(path)])
    assert "| genft-tiled |" in section and "Not timed" not in section


@pytest.mark.parametrize("name", ["genft-fast", "genft-fast-layer", "genft-fast-both", "genft-tiled"])
def test_less_is_kept_than_by_lora_of_equal_k(rows, name):
    """LoRA keeps W + dW of all experts."""
    lora = min(rows[base]["kept_bytes"] for base in ("lora-grouped", "lora-eager"))
    assert lora - rows["frozen"]["kept_bytes"] > rows[name]["stack_bytes"]
    assert rows[name]["kept_bytes"] < lora


@pytest.mark.parametrize("name", ["genft-fast", "genft-fast-both"])
def test_peak_is_below_that_of_lora_of_equal_k(rows, name):
    assert rows[name]["peak_bytes"] < min(rows[base]["peak_bytes"] for base in ("lora-grouped", "lora-eager"))


def test_parameters_beside_those_of_lora(rows):
    """Of equal k: 4 of 8 units are shared, those of gate and up are one pair, and the column stage has no out."""
    hidden, inner, experts, k = 64, 96, 4, 8
    assert rows["lora-grouped"]["trained"] == experts * k * (hidden + 2 * inner + inner + hidden)
    units = 2 * (hidden + inner)  # down and up of one unit, of both projections
    assert rows["genft-fast"]["trained"] == (k // 2 + experts * k // 2) * units
    assert rows["genft-fast-layer"]["trained"] == k * units


def test_methods_adapt_the_experts_of_the_block():
    for method in METHODS:
        block = method.build(SMALL, torch.float32, 8)
        adapted = sum(isinstance(module, GenFTExperts) for module in block.modules())
        assert adapted == method.name.startswith("genft")


def test_command_says_what_it_cannot_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    sizes = ["--hidden", "32", "--inner", "48", "--experts", "3", "--tokens", "9", "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="2"):
        command.main([*sizes, "--dtype"])
    with pytest.raises(SystemExit, match="2"):
        command.main([*sizes, "--chosen", "4"])
    assert "--chosen must be at most --experts, 3; got 4" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(command, "METHODS", [spoilt("frozen", no_kernel), BY_NAME["frozen"]])
    assert command.main([*sizes, "--dtype", "float32", "--turns", "1"]) == 1
    printed = capsys.readouterr().out
    assert "spoilt            failed: RuntimeError: no such kernel\n" in printed and "frozen " in printed


def test_command_writes_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    sizes = ["--hidden", "32", "--inner", "48", "--experts", "3", "--tokens", "9"]
    assert command.main(["--turns", "1", "--dtype", "float32", "--output", str(tmp_path), *sizes]) == 0
    (path,) = tmp_path.glob("*/experts.jsonl")
    assert [row["method"] for row in read_rows(path)] == [method.name for method in METHODS]
    assert "genft-fast " in capsys.readouterr().out
    section = expert_tables.section(read_rows(path))
    assert section.count("\n| genft-fast |") == 1 and "d 32, m 48, 3 experts, top 2, 9 tokens, k 8, float32" in section
