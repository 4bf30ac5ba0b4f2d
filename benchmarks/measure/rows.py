"""Result rows as JSON lines, one file a suite and device; a row measured again takes the old one's place."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"

Row = dict[str, Any]


class ResultStore:
    """The rows of `<root>/<device>/<suite>.jsonl`, told apart by the fields named in `key`.

    Every change is on disk when the call returns, by an atomic rename: an interrupted run keeps its finished rows.

    Raises:
        ValueError: a line of the file is not a JSON object; the message has its number.
    """

    def __init__(self, device_name: str, suite: str, key: tuple[str, ...], root: Path = RESULTS) -> None:
        self.path = root / folder_name(device_name) / f"{suite}.jsonl"
        self.key = key
        self._rows = {self._identity(row): row for row in read_rows(self.path)}

    def check_writable(self) -> None:
        """Raise OSError now, not after minutes of measuring, if rows cannot be written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.path.parent):
            pass

    @classmethod
    def of_command(
        cls, device_name: str, suite: str, key: tuple[str, ...], root: Path, writes: bool = True
    ) -> ResultStore:
        """The store of a command; where it cannot be read, or written, that ends the command with status 2."""
        try:
            store = cls(device_name, suite, key, root)
            if writes:
                store.check_writable()
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
        return self._rows.get(self._identity(fields))

    def upsert(self, rows: Iterable[Row]) -> None:
        """Add rows, or put them in the place of those with the same key."""
        for row in rows:
            self._rows[self._identity(row)] = row
        self._write()

    def discard(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Remove the rows with these keys, where they exist."""
        for row in rows:
            self._rows.pop(self._identity(row), None)
        self._write()

    def _identity(self, row: Mapping[str, Any]) -> tuple:
        return tuple(row.get(field) for field in self.key)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self._rows.values()))
        partial.replace(self.path)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none where it does not exist."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object")
        rows.append(row)
    return rows


def folder_name(device_name: str) -> str:
    """A device's name as a folder: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)", "", device_name.lower())).strip("-")
