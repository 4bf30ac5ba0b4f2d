"""Rows of the suite "model_step" as Markdown."""

from collections.abc import Iterable

from benchmarks.measure.rows import Row
from benchmarks.report import tables
from benchmarks.report.tables import markdown, mebibytes, not_timed, number, ratio
from benchmarks.step.methods import METHODS, lora_of

SUITE = "model_step"
# By method, its column in the summary. The official way has no column stage alone.
SHOWN = {
    "genft-fast": "GenFT `fast`", "genft-fast-both": "GenFT `fast-both`", "genft-fast-sum": "GenFT `fast-sum`",
    "genft-vtab": "GenFT `vtab`", "official-fast-both": "official `fast-both`",
    "official-vtab": "official `vtab`",
}  # fmt: skip
CASE = ("model", "batch", "sequence", "accumulation", "dtype")
INTRODUCTION = """\
`make bench-model`: forward, backward and AdamW's update, q and v of every layer adapted, or every linear layer where
the model's name says so; random weights, the backbone's own dropout off. Methods take turns, and a ratio is the median
over the turns of two times of one turn;
where methods of a case differ in turns, they were measured in different runs.
"× LoRA" and "kept × LoRA" are to PEFT's LoRA of the same k, "× official" to the official way of the same form.

- **generator**: what generation takes of a step, forward and backward, divided by the micro-batches; share of the step.
- **kept**: what autograd saves of one micro-batch, each storage once, beside parameters.
- **peak**: the most memory during a step beyond what was there: of tensors on a GPU, on a CPU of the whole process.
- **launches**: kernels of one micro-batch and AdamW's update, over the number of adapted layers.

What the tokens do not change is counted beforehand. Generation goes over W twice a step, forward and backward, with 2
k multiplications an element, where the big products take 2 T: k / T of them, k 19: 20 % for 96 tokens, 15 % for 128
and 4 % for 512. Of a sum both stages do, k 15 each: 31, 23 and 6 %. Thin products run at about half the speed of the
big ones on these CPUs, and LoRA's step is a third more than its big products; so where every linear layer is adapted,
`fast` is predicted at 1.3, 1.2 and 1.06 times the time of LoRA of the same k, `fast-sum`, k 30, at 1.47, 1.35 and 1.09,
and what is above that is our own. Where it goes is in `genft_kernels/sharing/README.md`. Kept is predicted at
4 k (in + out) bytes a layer above LoRA's for one stage and for a sum, 4 k (in + 2 out) for two in turn, whatever the
tokens.

Nothing is timed before the gradients of a tiny model agree with those of the plain model whose weights are W + dW: in
float64 each to 1e-10, and in the case's dtype within twice plain PyTorch's error.
"""


def section(rows: list[Row]) -> str:
    """A line for each case, what was not timed, and a table for each case."""
    parts = [INTRODUCTION, summary(rows), "#### Not timed\n\n" + not_timed(rows, CASE, "method")]
    parts += [f"#### {title(case)}\n\n{_case_table(found)}" for case, found in by_case(rows).items()]
    return "\n".join(parts)


def summary(rows: list[Row]) -> str:
    """Steps relative to LoRA of the same k, through `accumulate` where there are several micro-batches."""
    header = (
        "training step: model, tokens, dtype", "LoRA tokens/s", *SHOWN.values(), "full fine-tuning",
        "kept, `fast`", "kept, `fast-both`", "kept, `fast-sum`",
    )  # fmt: skip
    lines = []
    for case, found in by_case(rows).items():
        lora = next((row for name, row in found.items() if name.startswith("lora-")), None)
        forms = [shortest(found, name) for name in SHOWN]
        if lora is not None:
            ratios = [*map(_to_lora, forms), ratio(found.get("full"), lora["method"])]
            kept = [_kept_ratio(form, found) for form in forms[:3]]
            lines.append((title(case), number(lora["tokens_per_second"]), *ratios, *kept))
    return markdown(header, lines)


def shortest(found: dict[str, Row], name: str) -> Row | None:
    """With `accumulate` where the step has several micro-batches."""
    return found.get(f"{name}-accumulate") or found.get(name)


def by_case(rows: Iterable[Row]) -> dict[tuple, dict[str, Row]]:
    """Measured rows by case and method."""
    return tables.by_case(rows, (*CASE, "method"), METHODS)


def title(case: tuple) -> str:
    """One case in words."""
    model, batch, sequence, accumulation, dtype = case
    return f"{model}, {f'{accumulation} × ' if accumulation > 1 else ''}{batch} × {sequence}, {dtype}"


def _case_table(found: dict[str, Row]) -> str:
    header = (
        "method", "trained", "turns", "step ms", "p20 to p80", "tokens/s", "× LoRA", "× official", "generations",
        "generator ms", "share", "kept MiB", "kept × LoRA", "peak MiB", "launches",
    )  # fmt: skip
    lines = []
    for name, row in found.items():
        low, middle, high = row["time_ms"]
        preset, generates = name.partition("-")[2].removesuffix("-accumulate"), row["generator_ms"] is not None
        lines.append(
            (
                METHODS[name].title if name in METHODS else name, f"{row['trained']:,}", row["samples"], number(middle),
                f"{number(low)} to {number(high)}", number(row["tokens_per_second"]), _to_lora(row),
                ratio(row, f"official-{preset}"), row["generations"],
                *((number(row["generator_ms"]), f"{row['generator_share']:.1%}") if generates else (None, None)),
                mebibytes(row["kept_bytes"]), _kept_ratio(row, found), mebibytes(row["peak_bytes"]),
                row["launches_per_layer"],
            )
        )  # fmt: skip
    sizes = next(iter(found.values()))
    return f"{sizes['layers']} layers, width {sizes['width']}.\n\n" + markdown(header, lines)


def _to_lora(row: Row | None) -> str | None:
    return row and ratio(row, lora_of(row["k"], row["method"]))


def _kept_ratio(row: Row | None, found: dict[str, Row]) -> str | None:
    lora = row and found.get(lora_of(row["k"], row["method"]))
    return f"{row['kept_bytes'] / lora['kept_bytes']:.2f}" if lora and row["kept_bytes"] else None
