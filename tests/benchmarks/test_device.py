"""The one call on a GPU machine: its order, limits and rows, with checks that need no GPU."""

import importlib
import signal
import sys
import time
import warnings

import pytest
import torch

from benchmarks import device
from benchmarks.kernel import __main__ as kernels
from benchmarks.layer import __main__ as layers
from benchmarks.measure.rows import ResultStore
from benchmarks.step import __main__ as model_step

_BEGIN = "import signal, time; print('begun', flush=True)"
_SLOW = f"{_BEGIN}\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('2 failed so far', flush=True)"


def python(name, code, seconds=20.0, **variables):
    return device.Check(name, (sys.executable, "-c", code), seconds, tuple(variables.items()))


def test_every_check_gets_its_row_and_a_failure_shows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(device, "GRACE", 3.0)
    todo = [
        python("good", "print('first'); print('fine')"),
        python("bad", "import sys; print('broken'); sys.exit(3)"),
        python("slow", _SLOW, seconds=3),
        python("deaf", f"{_BEGIN}\nsignal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)", seconds=3),
        device.Check("absent", ("no-such-program",), 5),
        python("after", "import os; print(os.environ['HERE'])", HERE="set"),
    ]
    store = ResultStore("some card", "checks", ("check",), tmp_path)
    start = time.perf_counter()
    assert not device.run_all(todo, store, {"device": "some card"}, 5, tmp_path / "log")
    assert time.perf_counter() - start < 50
    rows = {row["check"]: row for row in ResultStore("some card", "checks", ("check",), tmp_path)}
    assert [(rows[name]["status"], rows[name]["last"]) for name in rows] == [
        ("passed", "fine"),
        ("failed with 3", "broken"),
        ("out of time", "2 failed so far"),
        ("out of time", "begun"),
        ("unavailable", "no-such-program is not on this machine"),
        ("passed", "set"),
    ]
    assert all(row["device"] == "some card" for row in rows.values())
    assert "first" in (tmp_path / "log").read_text()


def test_a_slow_check_reports_from_the_background_too(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell has it there
    try:
        row = device.run_check(python("slow", _SLOW), 2, tmp_path / "log")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (row["status"], row["last"]) == ("out of time", "2 failed so far")


def test_checks_without_time_left_are_named_and_not_run(tmp_path, capsys):
    store = ResultStore("some card", "checks", ("check",), tmp_path)
    assert device.run_all([python("late", "raise SystemExit(1)")], store, {}, 0.1, tmp_path / "log")
    assert "late: no time left" in capsys.readouterr().out and len(store) == 0


def test_every_check_is_a_command_that_parses(tmp_path):
    """A misspelt option would cost a call on a GPU machine."""
    parsers = {
        "benchmarks.layer": layers._parse, "benchmarks.kernel": kernels._parse, "benchmarks.step": model_step._parse,
    }  # fmt: skip
    parsed = []
    for check in device.checks(tmp_path, tmp_path / "scratch"):
        if check.command[1] == "-m" and check.command[2] in parsers:
            parsers[check.command[2]](list(check.command[3:]))
            parsed.append(check.command[2])
    assert {*parsed} == {*parsers}


def test_tests_on_a_card_come_before_timings(tmp_path):
    todo = device.checks(tmp_path, tmp_path / "scratch")
    names = [check.name for check in todo]
    assert names[:2] == ["build", "GPU tests"]
    assert {f"{tool}, cuda" for tool in ("memcheck", "racecheck", "initcheck", "synccheck")} < set(names) and names[
        -1
    ] == "full grid"


def test_remarks_of_pytorch_on_a_gpu_fail_no_test(monkeypatch):
    """Here a warning is an error; what PyTorch warns of at its first use of a GPU must not be one."""
    from torch._inductor import compile_fx

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    compile_fx._warn_tf32_disabled.__wrapped__()
    # What only a build for GPUs says, from C++.
    warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=1)
    warnings.warn("Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set", stacklevel=1)
    with pytest.raises(UserWarning):
        warnings.warn("any other", stacklevel=1)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--minutes", "0"], "--minutes: must be above 0, got 0"),
        (["--only", "nonsense"], "--only: no nonsense; there are"),
    ],
)
def test_bad_arguments_are_usage_errors(arguments, words, capsys):
    with pytest.raises(SystemExit) as error:
        device.main(arguments)
    assert error.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is at hand")
def test_command_says_so_without_a_gpu(tmp_path, capsys):
    assert device.main(["--output", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert device.main(["--list", "--only", "mem", "build"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("build: ")


COMMANDS = ["device", *(f"{name}.__main__" for name in ("layer", "kernel", "step", "report", "finetune"))]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_is_printed(name, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert "usage: " in capsys.readouterr().out
