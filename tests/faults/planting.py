"""Planting faults one at a time in a copy of the project, to see that a test turns red."""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch._dynamo  # as many tests will

ROOT = pathlib.Path(__file__).parents[2]
NOT_COMPILED = "g++ failed on the CUDA sources"  # says tests/cuda_host
SECONDS = 900  # a fault may let a test wait for ever, which counts as caught


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
    arguments = ["-q", "-x", "-p", "no:cacheprovider", *tests]
    if "-k" in tests and "triton" in tests[-1]:
        result = run_python(folder, "-m", "pytest", *arguments, TRITON_INTERPRET="1")
    else:
        result = in_fork(lambda: _pytest(folder, arguments))
    if " passed" not in result.stdout:  # all skipped is no pass
        result.returncode = result.returncode or 1
    return result


def _pytest(folder: pathlib.Path, arguments: list[str]) -> int:
    """pytest in this process, with all that is the project's from `folder`."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("genft_kernels", "benchmarks", "tests")]:
        del sys.modules[name]
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ.update(PYTHONPATH=str(folder), OMP_NUM_THREADS="1")
    return pytest.main(arguments)


def in_fork(judge: Callable[[], int]) -> subprocess.CompletedProcess:
    """`judge` in a fork, so that torch and others need not be imported each time; it ends after `SECONDS`."""
    torch.set_num_threads(1)  # others would be missing in the fork
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            code = 1
            try:
                code = judge()
            except BaseException as reason:
                print(reason)
            sys.stdout.flush()
            os._exit(code)
        deadline, status = time.monotonic() + SECONDS, None
        while status is None:
            done, ended = os.waitpid(child, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(ended)
            elif time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
            time.sleep(0.05)
        output.seek(0)
        return subprocess.CompletedProcess([], status, output.read())


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


def fate(fault: Fault, folder: pathlib.Path, run: Run) -> tuple[str, str | None]:
    """(the end of a planted fault: "caught", "SURVIVED" or "NOT PLANTED" with the reason, the test that caught it).

    There is no such test after a crash, or where `run` is not pytest.
    """
    path = folder / fault.file
    sound = path.read_text()
    path.write_text(sound.replace(fault.old, fault.new))
    try:
        result = run(folder, fault.tests)
    finally:
        path.write_text(sound)
    if NOT_COMPILED in result.stdout:
        return "NOT PLANTED, it does not compile", None
    if result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        return "NO TEST RAN", None
    if result.returncode == 0:
        return "SURVIVED", None
    test = re.search(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", result.stdout, re.MULTILINE)
    return "caught", test and test[1]


def plant(faults: list[Fault], run: Run = run, share: float = 1.0, rows: pathlib.Path | None = None) -> int:
    """Plant each fault in a copy of the project, `run` its tests and print its fate; 0 if that `share` is caught.

    The tests that caught them must pass in the unchanged copy. Fates are added to the file `rows`, a line each, and
    what is there already is not run again.
    """
    if complaints := lost(faults):
        print(*complaints, sep="\n")
        return 1
    lines = rows.read_text().splitlines() if rows is not None and rows.exists() else []
    known = {row["of"]: (row["fate"], row["by"]) for row in map(json.loads, lines)}
    caught, judges = 0, collections.defaultdict(dict)  # tests and files of tests, by the other arguments
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "demo-output", "build", "dist")
        shutil.copytree(ROOT, folder, ignore=ignored)
        for fault in faults:
            of, begin = hashlib.sha256(repr(fault).encode()).hexdigest()[:16], time.monotonic()
            if of not in known:
                known[of] = outcome, by = fate(fault, folder, run)
                if rows is not None:
                    seconds = round(time.monotonic() - begin)
                    row = {"of": of, "what": fault.what, "fate": outcome, "by": by, "seconds": seconds}
                    with rows.open("a") as file:
                        print(json.dumps(row), file=file)
            outcome, by = known[of]
            if outcome == "caught":
                caught += 1
                files = [argument for argument in fault.tests if argument.endswith(".py")]
                others = tuple(argument for argument in fault.tests if argument not in files)
                judges[others].update(dict.fromkeys([by] if by else files))
            print(f"{outcome:8}  {fault.what}", flush=True)
        judged = [[*places, *others] for others, places in judges.items()]
        broken = [" ".join(tests) for tests in judged if run(folder, tests).returncode]
    unproven = [f"but the unchanged copy fails, too: {tests}" for tests in broken]
    print(f"{caught} of {len(faults)} faults caught", *unproven, sep="\n")
    return int(caught < share * len(faults) or bool(broken))


def main(faults: list[Fault], run: Run = run, share: float = 1.0, argv: list[str] | None = None) -> int:
    """`plant` those faults that the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*", help="only faults with one of these in their name, as a file's name")
    parser.add_argument("--rows", type=pathlib.Path, help="a file of fates: what is there is not run again")
    parser.add_argument("--check", action="store_true", help="only see whether all of them can be planted")
    given = parser.parse_args(argv)
    wanted = [fault for fault in faults if not given.words or any(word in fault.what for word in given.words)]
    if given.check:
        print(*lost(wanted), sep="\n")
        return int(bool(lost(wanted)))
    return plant(wanted, run, share, given.rows)
