"""Result rows as JSON lines, one file a suite and device; a row measured again takes the old one's place.

What a whole run has in common, `RUN_FIELDS`, is written once, as a line {"run": {"id": 0, ...}}; a row names it by
"run": 0. In memory every row has all its fields.
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from genft_kernels.files.folder import only_saver

RESULTS = Path(__file__).parents[1] / "results"
RUN_FIELDS = (
    "device", "commit", "sources", "genft_kernels", "python", "torch", "triton", "peft", "unsloth", "nemo_automodel",
    "transformers", "cuda", "capability", "cpu_capability", "nvcc", "copy_terabytes", "product_teraflops",
    "data", "epochs", "batch_size",
)  # fmt: skip

Row = dict[str, Any]


class ResultStore:
    """The rows of `<root>/<device>/<suite>.jsonl`, told apart by the fields named in `key`.

    Every change is on disk when the call returns: an interrupted run keeps its finished rows. What other processes have
    added meanwhile stays there.

    Raises:
        ValueError: a line of the file is no row; the message has its number.
    """

    def __init__(self, device_name: str, suite: str, key: tuple[str, ...], root: Path = RESULTS) -> None:
        self.path = root / folder_name(device_name) / f"{suite}.jsonl"
        self.key = key
        self._rows = {_identity(row, key): row for row in read_rows(self.path)}

    @classmethod
    def of_command(
        cls, device_name: str, suite: str, key: tuple[str, ...], root: Path, writes: bool = True
    ) -> "ResultStore":
        """The store of a command; where it cannot be read, or written, that ends the command with status 2."""
        try:
            store = cls(device_name, suite, key, root)
            if writes:  # to find out now, not after minutes of measuring
                store.path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=store.path.parent):
                    pass
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        return store

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, fields: Mapping[str, Any]) -> Row | None:
        """The row with these key fields."""
        return self._rows.get(_identity(fields, self.key))

    def upsert(self, rows: Iterable[Row]) -> None:
        """Add rows, or put them in the place of those with the same key; the store then has what the file has."""
        self._rows = {_identity(row, self.key): row for row in upsert_rows(self.path, self.key, rows)}


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none where it does not exist.

    Raises:
        ValueError: a line is no row, or names a run that the lines before it do not have; the message has its number.
    """
    rows, runs = [], {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            run = row.pop("run", None)
            if isinstance(run, dict):
                runs[run.pop("id")] = run
            else:
                rows.append(row if run is None else row | runs[run])
        except KeyError as error:
            raise ValueError(f"{path}, line {number}: no run {error}") from error
        except ValueError as error:
            kind = "not JSON: " if isinstance(error, json.JSONDecodeError) else ""
            raise ValueError(f"{path}, line {number}: {kind}{error}") from error
    return rows


def upsert_rows(path: Path, key: tuple[str, ...], rows: Iterable[Row]) -> list[Row]:
    """Add rows to a file, or put them in the place of those whose fields in `key` are the same; all that it then has.

    Processes wait for each other, and the file is read anew: for hours each may measure what others do not know of.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with only_saver(path.parent):
        found = {_identity(row, key): row for row in [*read_rows(path), *rows]}
        write_rows(path, found.values())
    return list(found.values())


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a file that `read_rows` reads, whole or not at all."""
    runs: list[Row] = []
    lines = []
    for row in rows:
        run = {field: row[field] for field in RUN_FIELDS if field in row}
        rest = {field: value for field, value in row.items() if field not in run}
        if run and run not in runs:
            runs.append(run)
        lines.append(rest | ({"run": runs.index(run)} if run else {}))
    heads = [{"run": {"id": number} | run} for number, run in enumerate(runs)]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text("".join(json.dumps(line) + "\n" for line in [*heads, *lines]))
    partial.replace(path)


def _identity(row: Mapping[str, Any], key: tuple[str, ...]) -> tuple:
    return tuple(row.get(field) for field in key)


def folder_name(device_name: str) -> str:
    """A device's name as a folder: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)", "", device_name.lower())).strip("-")
