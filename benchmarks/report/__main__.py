"""`make bench-report`: docs/results.md, its plot and README's figures, from the result files and nothing else."""

import argparse
import sys
from pathlib import Path

from benchmarks.finetune import table as finetune_table
from benchmarks.measure.environment import REPOSITORY
from benchmarks.measure.rows import RESULTS, Row, read_rows, write_rows
from benchmarks.report import decode_tables, expert_tables, layer_tables, six_bars, step_tables, tables, tokens_plot

BEGIN, END = "<!-- measured: begin (make bench-report writes this) -->", "<!-- measured: end -->"
_INTRODUCTION = """\
# Results

`make bench-report` writes this file from the rows under `benchmarks/results/`; do not edit it. How each suite measures
is said in its section.
"""
_FINETUNE = """\
`make compare`: q and v, the same data, batches, schedule and seeds for every method. Of each method's 12 settings
(rate, scale of the update, rate of the head; 6 where there is no head) all were tried with one seed and the best three
with a second on a validation part; the lowest mean loss decided (`benchmarks/finetune/sweep.jsonl`). The test part was
looked at with other seeds: mean and standard deviation over them. The best epoch is picked on that test part, as the
official code does. Of a perplexity the lower one is better. The difference to LoRA of the same size is of the last
epochs, paired by seed. Peak memory is that of one forward and backward over the longest examples, beyond weights and
optimizer state; a step's time is the processor's, on a machine with other work: how steps compare is in the tables of
whole steps. The tables of all tasks have last epochs' means, in brackets the difference to LoRA and half its 95 %
interval; VeRA, the official preset, BitFit and a linear probe have sizes of their own.
"""


def _finetune(rows: list[Row]) -> str:
    return "\n".join([_FINETUNE, finetune_table.overview(rows), finetune_table.tables(rows)])


# By suite, in this order: the heading and the tables; of any other, its fields.
_SECTIONS = {
    layer_tables.SUITE: ("One layer", layer_tables.section),
    step_tables.SUITE: ("A training step of a whole model", step_tables.section),
    decode_tables.SUITE: ("Decoding", decode_tables.section),
    expert_tables.SUITE: ("Stacked experts", expert_tables.section),
    finetune_table.SUITE: ("Fine-tuning", _finetune),
    "kernels": ("Each kernel alone", tables.generic),
    "agreement": ("Two runs of one layer, ratios to PEFT's LoRA", tables.generic),
}


class ReportError(Exception):
    """Something that the user can put right; the message says what."""


def write_report(results: Path = RESULTS, root: Path = REPOSITORY) -> list[Path]:
    """Write docs/results.md, its plots and the section between README's markers, below `root`.

    Returns:
        What was written.

    Raises:
        ReportError: no results, or no markers.
    """
    devices = {folder.name: _suites(folder) for folder in sorted(results.glob("*/"))}
    devices = {name: rows for name, rows in devices.items() if rows}
    if not devices:
        raise ReportError(f"no results under {results}; run make bench first")
    readme, docs = root / "README.md", root / "docs"
    text = readme.read_text()
    if BEGIN not in text or END not in text or text.index(BEGIN) > text.index(END):
        raise ReportError(f"{readme} needs the lines {BEGIN} and {END}, in this order")
    bars = {_device(rows): costs for rows in devices.values() if (costs := six_bars.measured(rows))}
    sweeps = [
        (_device(rows), found)
        for rows in devices.values()
        if (found := tokens_plot.sweep(rows.get(layer_tables.SUITE, ()))) is not None
    ]
    pictures = {}
    for name, words, draw, shown in (
        ("six_bars.png", "cost relative to PEFT's LoRA", six_bars.draw, list(bars.items())),
        ("cost_over_tokens.png", "cost of one layer over tokens", tokens_plot.draw, sweeps),
    ):
        if shown:
            draw(shown, docs / name)
            pictures[docs / name] = f"![{words}]({name})\n"
    document = "\n".join([_INTRODUCTION, *pictures.values(), *(_section(rows) for rows in devices.values())])
    (docs / "results.md").write_text(document)
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    readme.write_text(f"{before}\n{_summary(devices, bars)}\n{after}")
    return [docs / "results.md", *pictures, readme]


def _suites(folder: Path) -> dict[str, list[Row]]:
    """A device's rows by suite, suites in the order of their sections."""
    found = {path.stem: read_rows(path) for path in sorted(folder.glob("*.jsonl"))}
    order = [*(suite for suite in _SECTIONS if suite in found), *(suite for suite in found if suite not in _SECTIONS)]
    return {suite: found[suite] for suite in order if found[suite]}


def _device(rows: dict[str, list[Row]]) -> str:
    return next((row["device"] for suite in rows.values() for row in suite if "device" in row), "unknown device")


def _section(rows: dict[str, list[Row]]) -> str:
    parts = [f"## {_device(rows)}\n"]
    for suite, each in rows.items():
        heading, table = _SECTIONS.get(suite, (suite.replace("_", " ").capitalize(), tables.generic))
        parts.append(f"### {heading}\n\n{tables.provenance(each)}\n{table(each)}")
    return "\n".join(parts)


def _summary(devices: dict[str, dict[str, list[Row]]], bars: dict[str, six_bars.Costs]) -> str:
    """README's section: the plot, its figures, and the fine-tuning comparison."""
    parts = ["![cost relative to PEFT's LoRA](docs/six_bars.png)\n", six_bars.table(bars.items())] if bars else []
    for rows in devices.values():
        if finetune := rows.get(finetune_table.SUITE):
            parts.append(finetune_table.summary(finetune))
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Write everything and say what was written, or compare two runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default benchmarks/results")
    parser.add_argument("--root", type=Path, default=REPOSITORY, metavar="DIR", help="of README.md and docs/")
    compared = (
        "two layer.jsonl: how well their ratios agree, for agreement.jsonl beside the first; 1 if not within 10 %%"
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar="FILE", help=compared)
    options = parser.parse_args(argv)
    try:
        if options.compare:
            row = layer_tables.agreement(*(read_rows(path) for path in options.compare))
            write_rows(options.compare[0].with_name("agreement.jsonl"), [row])
            print(row)
            return int(row["worst"] > layer_tables.TOLERANCE)
        written = write_report(options.results, options.root)
    except (ReportError, OSError, ValueError) as error:
        parser.error(str(error))
    print("wrote " + ", ".join(str(path) for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
