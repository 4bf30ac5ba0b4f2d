"""A progress bar for the run under way, and one line for each that is done."""

from collections.abc import Callable
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .training import Run


@contextmanager
def progress_bars(console: Console):
    """Yield ``start(label, steps)``, which opens a bar and returns the callback that a run moves it with."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:

        def start(label: str, steps: int) -> Callable[[Run], None]:
            task = progress.add_task(label, total=steps, note="")

            def on_step(run: Run) -> None:
                note = f"loss {run.losses[-1]:.2f}"
                if run.evaluations:
                    note += f", accuracy {run.accuracy:.3f}"
                progress.update(task, completed=len(run.losses), note=note)
                if len(run.losses) == steps:
                    progress.remove_task(task)
                    progress.print(f"{label}: {steps} steps in {sum(run.step_seconds):.0f} s, {note}", highlight=False)

            return on_step

        yield start
