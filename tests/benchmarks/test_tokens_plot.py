"""Cost over tokens, from rows of one layer."""

import pytest

from benchmarks.layer.cases import Case
from benchmarks.report import tokens_plot
from tests.helpers.small_benchmarks import SMALL, measure, select

TOKENS = (1, 5, 17)


@pytest.fixture(scope="module")
def rows():
    providers = select(["peft-lora", "genft-eager", tokens_plot.FLOOR])
    pytest.importorskip("peft", reason="PEFT is not installed")
    return measure(providers, *(Case(SMALL, tokens, "float32", 8, "factored") for tokens in TOKENS))


def test_lines_are_those_of_the_rows(rows):
    title, lines = tokens_plot.sweep(rows)
    assert title == "small, float32, k 8, factored" and tuple(lines) == tokens_plot.LINES
    wanted = {"GenFT": "genft-eager", "PEFT LoRA": "peft-lora", "floor: the two big products": tokens_plot.FLOOR}
    for name, provider in wanted.items():
        expected = [(row["tokens"], row["time_ms"]["both"][1]) for row in rows if row["provider"] == provider]
        assert lines[name] == expected and [tokens for tokens, _ in expected] == list(TOKENS)


def test_too_few_points_make_no_line(rows):
    assert tokens_plot.sweep([row for row in rows if row["tokens"] < 17]) is None
    assert tokens_plot.sweep([]) is None


def test_the_plot_is_drawn(rows, tmp_path):
    tokens_plot.draw([("device", tokens_plot.sweep(rows))], tmp_path / "docs" / "plot.png")
    assert (tmp_path / "docs" / "plot.png").stat().st_size > 5000
