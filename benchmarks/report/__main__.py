"""`make bench-report`: plots, RESULTS.md and README's section of figures, from the result files and nothing else."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure.rows import RESULTS, Row, read_rows
from benchmarks.report import plots, step_tables, tables

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- measured: begin (make bench-report writes this) -->", "<!-- measured: end -->"

_INTRODUCTION = """\
# Results

`make bench` measures, `make bench-report` writes this file from the rows beside it; do not edit it. One table a case.
Times are medians of milliseconds, of one layer; "both" is a forward and its backward, gradients for x and all that
trains. A CPU's providers take turns, two calls each of which the faster counts, and a ratio is the median over the
turns of two times of one turn; freed memory stays with the process. A GPU's are timed one after another, each call with
a cold L2, by replay of a CUDA graph up to 1,024 tokens.

- **of floor**: the time of the big products alone, which this one cannot do without, over its time: x·Wᵀ and dy·W, and
  for GenFT's tiled form also dyᵀ·x.
- **kept**: what autograd saves for the backward, beside x, W and what trains. **peak**: the most memory at once beyond
  what was there, results included.
- **gain**: how much of an update of a thousandth of W arrives in y and in dx; 1 is all of it.
- **equal parameters**: a LoRA that trains as many parameters over the model as GenFT does with k units.

Nothing is timed before its output and all its gradients agree with float64 within twice plain PyTorch's error.
"""


class ReportError(Exception):
    """Something that the user can put right; the message says what."""


def write_report(results: Path = RESULTS, readme: Path = README) -> list[Path]:
    """Write the plots, RESULTS.md and the section between the markers of `readme`; what was written.

    Raises:
        ReportError: no results, or no markers.
    """
    devices = {folder: read_rows(folder / "layer.jsonl") for folder in _folders(results)}
    if not devices:
        raise ReportError(f"no results under {results}; run make bench first")
    text = readme.read_text()
    if BEGIN not in text or END not in text or text.index(BEGIN) > text.index(END):
        raise ReportError(f"{readme} needs the lines {BEGIN} and {END}, in this order")
    written, sections = [], [_INTRODUCTION]
    for folder, rows in devices.items():
        for draw, name in ((plots.draw_cases, "layer.png"), (plots.draw_tokens, "tokens.png")):
            if draw(rows, folder / name):
                written.append(folder / name)
        sections += _device_sections(folder, rows)
    (results / "RESULTS.md").write_text("\n".join(sections))
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    readme.write_text(f"{before}\n{_summary(devices, readme.parent)}\n{after}")
    return [*written, results / "RESULTS.md", readme]


def _folders(results: Path) -> list[Path]:
    """Devices with layer results, GPUs first."""
    folders = sorted(path.parent for path in results.glob("*/layer.jsonl"))
    return sorted(folders, key=lambda folder: not any("cuda" in row for row in read_rows(folder / "layer.jsonl")))


def _device_sections(folder: Path, rows: list[Row]) -> Iterator[str]:
    yield f"## {_device(rows)}\n"
    yield _provenance(rows)
    if (folder / "layer.png").exists():
        yield f"![forward and backward relative to PEFT LoRA]({folder.name}/layer.png)\n"
    if (folder / "tokens.png").exists():
        yield f"![time over the number of tokens]({folder.name}/tokens.png)\n"
    agreement = folder / "agreement.json"
    if agreement.exists():
        yield _agreement(json.loads(agreement.read_text()))
    red = tables.refusals(rows, ("wrong", "failed"))
    yield f"### Not timed, because wrong or failed\n\n{red or 'None.'}\n"
    yield f"### Unavailable\n\n{tables.refusals(rows, ('unavailable',)) or 'None.'}\n"
    for case, each in tables.by_case(rows).items():
        yield f"### {tables.case_title(case)}\n\n{tables.case_table(each)}"
    for path in sorted(folder.glob("*.jsonl")):
        if path.stem != "layer" and (others := read_rows(path)):
            name = path.stem.replace("_", " ").capitalize()
            table = step_tables.section if path.stem == step_tables.SUITE else tables.generic_table
            yield f"### {name}\n\n{_provenance(others)}\n{table(others)}"


def _provenance(rows: list[Row]) -> str:
    """What the rows were measured with; several values where runs were mixed."""
    found = {field: dict.fromkeys(str(row[field]) for row in rows if row.get(field)) for field in _VERSIONS}
    return ", ".join(f"{field} {' and '.join(values)}" for field, values in found.items() if values) + ".\n"


_VERSIONS = tuple(field for field in tables.ENVIRONMENT_FIELDS if field not in ("device", "sources"))


def _device(rows: list[Row]) -> str:
    return next((row["device"] for row in rows), "no rows")


def _agreement(found: dict) -> str:
    return (
        f"The same command twice: {found['ratios']} ratios to PEFT LoRA, forward and backward together; they differ by "
        f"{found['median']:.1%} in the median and {found['worst']:.1%} at most; {found['within_10_percent']:.0%} agree "
        "within 10 %.\n"
    )


def _summary(devices: dict[Path, list[Row]], root: Path) -> str:
    """README's section: for each device a line a case, and the first device's plot."""
    parts = []
    for folder, rows in devices.items():
        parts.append(f"{_device(rows)}; {_provenance(rows)}")
        parts.append(_summary_table(rows))
        steps = read_rows(folder / f"{step_tables.SUITE}.jsonl")
        if steps:
            parts.append(step_tables.summary(steps))
    plot = next((folder / "layer.png" for folder in devices if (folder / "layer.png").exists()), None)
    if plot is not None:
        parts.append(f"![forward and backward relative to PEFT LoRA]({_relative(plot, root)})\n")
    return "\n".join(parts)


def _summary_table(rows: list[Row]) -> str:
    """Forward and backward of one layer: GenFT's fastest backend beside LoRA and the official way."""
    header = (
        "layer, tokens, dtype, k, form", "PEFT LoRA ms", "GenFT × LoRA", "of floor", "GenFT, H given × LoRA",
        "official × LoRA", "kept MiB: GenFT", "LoRA", "official",
    )  # fmt: skip
    lines, cases = [], tables.by_case(rows)
    for case in tables.telling(cases):
        found = tables.measured(cases[case])
        both = {name: directions["both"] for name, directions in found.items() if "both" in directions}
        lora, official = both.get("peft-lora"), both.get("official")
        genft, token_side = (_fastest(both, part) for part in ("layer", "token side"))
        if lora is None or genft is None:
            continue
        layer, _, _, tokens, dtype, k, form = case
        lines.append(
            (
                f"{layer}, {tokens}, {dtype}, {k}, {form}", tables.number(lora["time_ms"][1]),
                tables.ratio(genft, "peft-lora"), tables.fraction(genft) or "–",
                tables.ratio(token_side, "peft-lora") if token_side else "–",
                tables.ratio(official, "peft-lora") if official else "–",
                *(tables.mebibytes(row["kept_bytes"]) if row else "–" for row in (genft, lora, official)),
            )
        )  # fmt: skip
    return tables.markdown(header, lines)


def _fastest(both: dict[str, Row], part: str) -> Row | None:
    candidates = [row for name, row in both.items() if name.startswith("genft-") and row["part"] == part]
    return min(candidates, key=lambda row: row["time_ms"][1], default=None)


def _relative(path: Path, root: Path) -> str:
    return path.resolve().relative_to(root.resolve()).as_posix()


def main(argv: list[str] | None = None) -> int:
    """Write everything and say what was written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default benchmarks/results")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE", help="default README.md")
    options = parser.parse_args(argv)
    try:
        written = write_report(options.results, options.readme)
    except (ReportError, OSError, ValueError) as error:
        parser.error(str(error))
    print("wrote " + ", ".join(str(path) for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
