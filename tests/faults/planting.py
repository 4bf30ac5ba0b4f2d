"""Planting faults one at a time in a copy of the project, to see that a test turns red."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
NOT_COMPILED = "g++ failed on the CUDA sources"  # says tests/cuda_host
SECONDS = 900  # a fault may let a test wait for ever, which counts as seen


class Fault(NamedTuple):
    """One replacement in one file, and the tests that should notice."""

    what: str
    file: str
    old: str
    new: str
    tests: list[str]


Run = Callable[[pathlib.Path, list[str]], subprocess.CompletedProcess]


def run(folder: pathlib.Path, tests: list[str]) -> subprocess.CompletedProcess:
    """pytest on `tests` in the copy at `folder`, up to the first failure."""
    environment = {"TRITON_INTERPRET": "1"} if "triton" in tests[-1] else {}
    result = run_python(folder, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, **environment)
    if " passed" not in result.stdout:  # all skipped is no pass
        result.returncode = result.returncode or 1
    return result


def run_python(folder: pathlib.Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python in the copy at `folder`; all that it has started ends with it, after `SECONDS` at the latest."""
    settings = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen([sys.executable, *arguments], cwd=folder, env=environment, **settings) as process:
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, output)


def lost(faults: Iterable[Fault]) -> list[str]:
    """Complaints about faults whose text does not occur exactly once in its file."""
    complaints = []
    for fault in faults:
        path = ROOT / fault.file
        count = path.read_text().count(fault.old) if path.is_file() else 0
        if count != 1:
            complaints.append(f"{fault.what}: its text occurs {count} times in {fault.file}")
    return complaints


def fate(fault: Fault, folder: pathlib.Path, run: Run) -> str:
    """The end of a planted fault: "caught", "SURVIVED", or "NOT PLANTED" with the reason."""
    path = folder / fault.file
    sound = path.read_text()
    path.write_text(sound.replace(fault.old, fault.new))
    try:
        result = run(folder, fault.tests)
    finally:
        path.write_text(sound)
    if NOT_COMPILED in result.stdout:
        return "NOT PLANTED, it does not compile"
    return "SURVIVED" if result.returncode == 0 else "caught"


def plant(faults: list[Fault], run: Run = run, share: float = 1.0, rows: pathlib.Path | None = None) -> int:
    """Plant each fault in a copy of the project, `run` its tests and print its fate; 0 if that `share` is caught.

    Fates are added to the file `rows`, a line each, and what is there already is not run again.
    """
    if complaints := lost(faults):
        print(*complaints, sep="\n")
        return 1
    known = {row["of"]: row["fate"] for row in map(json.loads, rows.read_text().splitlines())} if _has(rows) else {}
    unchanged: dict[str, bool] = {}
    caught = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "demo-output", "build", "dist")
        shutil.copytree(ROOT, folder, ignore=ignored)
        for fault in faults:
            tests, of = " ".join(fault.tests), hashlib.sha256(repr(fault).encode()).hexdigest()[:16]
            begin = time.monotonic()
            if (outcome := known.get(of)) is None:
                if tests not in unchanged:
                    unchanged[tests] = run(folder, fault.tests).returncode == 0
                outcome = fate(fault, folder, run) if unchanged[tests] else f"the unchanged copy fails: {tests}"
                if rows is not None and unchanged[tests]:
                    row = {"of": of, "what": fault.what, "fate": outcome, "s": round(time.monotonic() - begin)}
                    with rows.open("a") as file:
                        print(json.dumps(row), file=file)
            caught += outcome == "caught"
            print(f"{outcome:8}  {fault.what}", flush=True)
    print(f"{caught} of {len(faults)} faults caught")
    return int(caught < share * len(faults))


def main(faults: list[Fault], run: Run = run, share: float = 1.0) -> int:
    """`plant` those faults that the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*", help="of the faults wanted, such as a file's name; all without any")
    parser.add_argument("--rows", type=pathlib.Path, help="a file of fates: what is there is not run again")
    parser.add_argument("--check", action="store_true", help="only see whether all of them can be planted")
    given = parser.parse_args()
    wanted = [fault for fault in faults if " ".join(given.words) in fault.what]
    if given.check:
        print(*lost(wanted), sep="\n")
        return int(bool(lost(wanted)))
    return plant(wanted, run, share, given.rows)


def _has(rows: pathlib.Path | None) -> bool:
    return rows is not None and rows.exists()
