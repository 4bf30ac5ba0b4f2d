"""Planting faults one at a time in a copy of the project, to see that a test turns red."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
NOT_COMPILED = "g++ failed on the CUDA sources"  # says tests/cuda_host


class Fault(NamedTuple):
    """One replacement in one file, and the tests that should notice."""

    what: str
    file: str
    old: str
    new: str
    tests: list[str]


def run(folder: pathlib.Path, tests: list[str]) -> subprocess.CompletedProcess:
    """pytest on `tests` in the copy at `folder`, up to the first failure."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    if "triton" in tests[-1]:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if " passed" not in result.stdout:  # all skipped is no pass
        result.returncode = result.returncode or 1
    return result


Run = Callable[[pathlib.Path, list[str]], subprocess.CompletedProcess]


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
    result = run(folder, fault.tests)
    path.write_text(sound)
    if NOT_COMPILED in result.stdout:
        return "NOT PLANTED, it does not compile"
    return "SURVIVED" if result.returncode == 0 else "caught"


def plant(faults: list[Fault], run: Run = run, share: float = 1.0) -> int:
    """Plant each fault in a copy of the project, `run` its tests and print its fate; 0 if that `share` is caught."""
    if complaints := lost(faults):
        print(*complaints, sep="\n")
        return 1
    caught = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "demo-output", "build", "dist")
        shutil.copytree(ROOT, folder, ignore=ignored)
        for tests in {tuple(fault.tests): fault.tests for fault in faults}.values():
            if run(folder, tests).returncode:
                print("the unchanged copy fails: " + " ".join(tests))
                return 1
        for fault in faults:
            outcome = fate(fault, folder, run)
            caught += outcome == "caught"
            print(f"{outcome:8}  {fault.what}", flush=True)
    print(f"{caught} of {len(faults)} faults caught")
    return int(caught < share * len(faults))
