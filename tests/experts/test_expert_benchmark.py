"""The benchmark of a block of experts: what it measures is right, and what it counts holds on a small block."""

import pytest
import torch

from benchmarks.experts import __main__ as command
from benchmarks.experts.methods import METHODS, Shape
from benchmarks.measure.rows import read_rows
from benchmarks.report import expert_tables
from genft_kernels.experts.layer import GenFTExperts

pytest.importorskip("peft")
pytest.importorskip("transformers")

SMALL = Shape(hidden=64, inner=96, experts=4, tokens=40)


def rows_of(dtype_name="float32", k=8):
    return {row["method"]: row for row in command.run(METHODS, SMALL, dtype_name, k, turns=1)}


@pytest.fixture(scope="module")
def rows():
    return rows_of()


def test_every_method_is_measured_beside_lora(rows):
    assert set(rows) == {method.name for method in METHODS}
    assert all(row["process_ms"] > 0 and row["ratio_lora-grouped"] > 0 for row in rows.values())
    assert rows["lora-eager"]["ratio_lora-eager"] == 1


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


def test_command_writes_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    sizes = ["--hidden", "32", "--inner", "48", "--experts", "3", "--tokens", "9"]
    assert command.main(["--turns", "1", "--dtype", "float32", "--output", str(tmp_path), *sizes]) == 0
    (path,) = tmp_path.glob("*/experts.jsonl")
    assert [row["method"] for row in read_rows(path)] == [method.name for method in METHODS]
    assert "genft-fast " in capsys.readouterr().out
    section = expert_tables.section(read_rows(path))
    assert section.count("\n| genft-fast |") == 1 and "d 32, m 48, 3 experts, top 2, 9 tokens, k 8, float32" in section
