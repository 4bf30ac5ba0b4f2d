"""Rows of the suite "decode" as Markdown."""

from benchmarks.measure.rows import Row
from benchmarks.report import tables
from benchmarks.report.tables import markdown, mebibytes, not_timed, number

SUITE = "decode"
CASE = ("model", "targets", "dtype", "prompt")
TITLES = {
    "base": "base model", "genft": "GenFT `fast`, unmerged", "genft-merged": "GenFT `fast`, merged",
    "lora": "PEFT LoRA of the same k, unmerged", "lora-of-equal-size": "PEFT LoRA of as many parameters, unmerged",
}  # fmt: skip
INTRODUCTION = """\
`make bench-model`: a prompt, then 16 tokens greedily, one at a time, with a cache, batch 1. The decoders take turns,
and a ratio is the median over the turns of two times of one turn. Nothing is timed before logits agree with those of
the base whose weights are W + dW by the specification. **Peak**: how much the process grows meanwhile, the cache
included.

Unmerged, a layer makes the products that LoRA makes, in fewer calls. With every linear layer adapted these alone take
0.91 of LoRA's time in float32 and 0.86 in bfloat16, in a run of its own, 12 turns, with parts of the forward taken out.
What it takes beyond LoRA's time is to see that its own tensors are what they were. Beside h and b, as large as LoRA's A
and B, it reads these and a copy of them, 2 · 4 r (in + out) bytes, 65 KB to LoRA's 88 at 576 × 576, and from memory,
because the whole model goes through the caches between two tokens (`genft_kernels/sharing/README.md#the-short-road`).
Of a token's 54 ms in that run, in float32, the comparison is 4.1, once a token, a glance before each of 210 layers 2.5,
and what else is asked of PyTorch's modes and of the layer 4.2. Merged, it reads W alone, as the base.
"""


def section(rows: list[Row]) -> str:
    """A list of what was not timed, and a table for each choice of layers and dtype."""
    parts = [INTRODUCTION, "#### Not timed\n\n" + not_timed(rows, CASE, "method")]
    for case, found in tables.by_case(rows, (*CASE, "method"), TITLES).items():
        model, targets, dtype, prompt = case
        parts.append(f"#### {model}, {targets}, {dtype}, prompt of {prompt} tokens\n\n{_case_table(found)}")
    return "\n".join(parts)


def _case_table(found: dict[str, Row]) -> str:
    header = (
        "decoder", "k", "trained", "tokens/s", "ms a token", "p20 to p80", "× base", "× LoRA", "prompt ms",
        "prompt × LoRA", "peak MiB",
    )  # fmt: skip
    lines = [
        (
            TITLES.get(name, name), row["k"], f"{row['trained']:,}", number(row["tokens_per_second"]),
            number(row["token_ms"][1]), f"{number(row['token_ms'][0])} to {number(row['token_ms'][2])}",
            _ratio(row, "base", "token"), _ratio(row, "lora", "token"), number(row["prompt_ms"][1]),
            _ratio(row, "lora", "prompt"), mebibytes(row["peak_bytes"]),
        )
        for name, row in found.items()
    ]  # fmt: skip
    return markdown(header, lines)


def _ratio(row: Row, base: str, part: str) -> str | None:
    return f"{row['ratios'][base][part][1]:.2f}" if base in row["ratios"] else None
