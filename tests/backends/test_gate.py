"""The gate that kernels pass on a card before "auto" takes them, and the choice that follows from it."""

import json
import re
import sys
import threading
import types

import pytest
import torch

from genft_kernels import backends
from genft_kernels.backends import card as cards
from genft_kernels.backends import gate
from genft_kernels.backends.compiled.run import BuildError
from genft_kernels.backends.cuda import extension
from genft_kernels.backends.eager import operations as eager
from tests.helpers.cases import CPU

VERDICT, FAILURE, NOTHING = gate.Outcome
CARD = torch.device("cuda", 0)
NAMES = ("column", "column_backward", "row", "row_backward", "linear", "linear_backward")


def backend(**replaced):
    """Eager's operations, some of them replaced."""
    return types.SimpleNamespace(**{name: getattr(eager, name) for name in NAMES} | replaced)


def without_row_70(z):
    return torch.where(torch.arange(z.shape[1])[:, None] == 70, 0, z)


def changed(name, change):
    """Eager's operation with its results changed."""
    return {name: lambda *args: tuple(None if each is None else change(each) for each in getattr(eager, name)(*args))}


FAULTS = {
    "column": (changed("column", lambda z: z * 1.001), "column .*: an error of"),
    "row": (
        changed("row", without_row_70),
        "row .*: an error of",
    ),
    "unwritten": (changed("linear_backward", lambda z: z.clone().index_fill_(0, torch.tensor(3), torch.nan)), "nan"),
    "race": (changed("linear", lambda z: z * (1 + 1e-6 * torch.rand(1))), "three runs give different bits"),
}


@pytest.fixture
def few_cases(monkeypatch):
    monkeypatch.setattr(gate, "CASES", gate.CASES[3:4])


@pytest.mark.parametrize("replaced, reason", FAULTS.values(), ids=FAULTS)
def test_gate_rejects_what_is_wrong_and_names_it(replaced, reason, few_cases):
    assert gate.examine(backend(), CPU) is None
    assert re.search(reason, gate.examine(backend(**replaced), CPU))


def test_gate_sees_a_swallowed_update(monkeypatch):
    """Rounded to nearest, W + dW is W where dW is small; each single result is as near as PyTorch's."""
    monkeypatch.setattr(gate, "CASES", gate.CASES[2:3])

    def linear(x, weight, bias, h, b, seed, *settings):
        if x.dtype == torch.bfloat16:
            x, weight, h, b = (each.float() for each in (x, weight, h, b))
            folded = eager.linear(torch.eye(weight.shape[1]), weight, None, h, b, seed, *settings)[0].t().bfloat16()
            return torch.nn.functional.linear(x.bfloat16(), folded, bias), None
        return eager.linear(x, weight, bias, h, b, seed, *settings)

    assert "of a small update is left" in gate.examine(backend(linear=linear), CPU)


def test_gate_sees_one_other_element_of_a_mask(monkeypatch):
    """In 16 bits, where it is no error of the whole that is too large."""
    monkeypatch.setattr(gate, "CASES", gate.CASES[1:2])

    def linear(x, *args):
        y, small = eager.linear(x, *args)
        if x.shape == (150, 150) and x.dtype == torch.float16:  # W + dW itself
            y[3, 70] = y.abs().max() / 8 if y[3, 70] == 0 else 0
        return y, small

    assert re.search("^linear .*: dropout keeps other elements", gate.examine(backend(linear=linear), CPU))


def test_gate_stops_at_the_first_failure(few_cases):
    calls = []
    noted = {name: lambda *args, name=name: calls.append(name) or getattr(eager, name)(*args) for name in NAMES}
    reason = gate.examine(backend(**noted | changed("column_backward", lambda z: 2 * z)), CPU)
    assert reason.startswith("column_backward") and set(calls) == {"column"}


def test_gate_sees_addresses_of_32_bits():
    def linear(x, weight, *args):
        near = weight.stride(0) * (weight.shape[0] - 1) < 2**31
        return eager.linear(x, weight if near else torch.zeros_like(weight), *args)

    assert re.search("^linear .*k 32, identity.*: an error of", gate.examine(backend(linear=linear), CPU))


def test_gate_leaves_out_what_a_card_has_no_room_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 80 << 30))
    case = gate.CASES[-1]
    assert case.lies == "far apart" and not gate._has_room(case, CARD) and gate._has_room(case, CPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 << 30, 80 << 30))
    assert gate._has_room(case, CARD)


def test_gate_has_its_kernels_compiled_side_by_side(monkeypatch):
    """Each thread waits for the others in its first operation, on the card in question."""
    cases = [case for case in gate.CASES if case.row]
    cards, together, ran = [], threading.Barrier(len(cases), timeout=20), threading.local()

    def column(*args):
        if not hasattr(ran, "before"):
            ran.before = together.wait()
        return eager.column(*args)

    monkeypatch.setattr(torch.cuda, "set_device", cards.append)
    gate._compile(backend(column=column), CPU)
    assert cards == [CPU] * len(cases) and len(cases) > 2
    with pytest.raises(ZeroDivisionError):
        gate._compile(backend(row=lambda *args: 1 / 0), CPU)


def test_gate_asks_triton_for_few_kernels():
    """Compiling is what takes its time on a card: nearly all by the cases that compile side by side, nothing twice."""
    pytest.importorskip("triton")
    from benchmarks.compiled.triton_compile import recording
    from genft_kernels.backends.triton import operations as triton

    counts = []
    with recording() as launches:
        for case in gate.CASES:
            list(gate._results(triton, case, case.dtype, CPU))
            counts.append(len(launches))
        for judge in (gate._masks_are_equal, gate._bias, gate._gain):
            judge(triton, gate.CASES[1], CPU)
    assert counts == [8, 16, 23, 31, 35, 35] and len(launches) == 35


def test_gate_compiles_before_it_judges_on_a_card(monkeypatch):
    judged = []
    monkeypatch.setattr(gate, "CASES", gate.CASES[3:])
    monkeypatch.setattr(gate, "_has_room", lambda case, device: False)
    monkeypatch.setattr(gate, "_compile", lambda backend, device: judged.append(device))
    monkeypatch.setattr(gate, "_results", lambda backend, case, dtype, device: judged.append(case) or iter(()))
    monkeypatch.setattr(gate, "_masks_are_equal", lambda *args: True)
    assert gate.examine(backend(), CARD) is None
    assert judged == [CARD, *[gate.CASES[0]] * 5, *[gate.CASES[1]] * 5]
    judged.clear()
    assert gate.examine(backend(), CPU) is None and CPU not in judged


@pytest.mark.slow
def test_gate_passes_what_is_right_in_a_process_of_its_own():
    assert gate.run("eager", CPU, 300) == (None, VERDICT)


def test_gate_sees_a_rounding_that_is_off():
    """By one bit too many: up where it should be down as often, which is no error of a single element."""
    case = gate.CASES[2]

    def linear(x, weight, *args):
        y, small = eager.linear(x, weight, *args)
        return (y + (y.abs() * 2**-8).to(y) * (y != weight.t()) * y.sign() if y.dtype == torch.bfloat16 else y), small

    assert abs(gate._bias(backend(), case, CPU)) < 0.05 < 0.2 < gate._bias(backend(linear=linear), case, CPU)


def test_gate_runs_in_a_process_of_its_own():
    reason, outcome = gate.run("no such backend", CPU, 120)
    assert "ModuleNotFoundError" in reason and "exit status 1" in reason and outcome is NOTHING
    reason, outcome = gate.run("eager", CPU, 0.01)
    assert "longer than 0 s" in reason and outcome is FAILURE


CHILDREN = {
    "passes": ("None", None, VERDICT),
    "rejects": ("'row: an error'", "row: an error", VERDICT),
    "room": ("raising(torch.OutOfMemoryError('no room'))", "no room (exit status 1)", NOTHING),
    "room for cuBLAS": (
        "raising(RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`'))",
        "cublasCreate` (exit status 1)",
        NOTHING,
    ),
    "room for a context": ("raising(torch.AcceleratorError('CUDA error: out of memory'))", "exit status 1", NOTHING),
    "room for a launch": (
        "raising(LaunchError('kernel failed to launch: RuntimeError: Triton Error [CUDA]: out of memory'))",
        "out of memory (exit status 1)",
        NOTHING,
    ),
    "raises": ("1 / 0", "ZeroDivisionError: division by zero (exit status 4)", FAILURE),
    "dies": ("os.kill(os.getpid(), signal.SIGSEGV)", "(exit status -11)", FAILURE),
    "stopped": ("os.kill(os.getpid(), signal.SIGTERM)", "its gate died (exit status -15)", NOTHING),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "its gate died (exit status -9)", NOTHING),
}


@pytest.mark.parametrize("body, reason, outcome", CHILDREN.values(), ids=CHILDREN)
def test_gate_tells_verdicts_from_what_the_machine_did(body, reason, outcome, monkeypatch):
    """A card without room, or a process that was stopped, is no fault of kernels to be kept."""
    script = f"""
import os, signal, sys, torch
from genft_kernels.backends import LaunchError, gate
def raising(error): raise error
gate.examine = lambda backend, device: {body}
sys.argv = ["gate", "eager", "cpu"]
gate.main()
"""
    real = gate.subprocess.run
    monkeypatch.setattr(gate.subprocess, "run", lambda command, **how: real([sys.executable, "-c", script], **how))
    found, told = gate.run("eager", CPU, 120)
    assert told is outcome and (found is None if reason is None else reason in found)


def test_cuda_kernels_are_compiled_before_the_gates_time_begins(monkeypatch):
    done = []
    monkeypatch.setattr(extension, "load", lambda: done.append("compiled"))
    child = types.SimpleNamespace(returncode=0)
    monkeypatch.setattr(gate.subprocess, "run", lambda *args, **how: done.append("child") or child)
    assert gate.run("cuda", CARD, 20) == (None, VERDICT) and done == ["compiled", "child"]

    def fails():
        raise BuildError("the disk is full")

    monkeypatch.setattr(extension, "load", fails)
    assert gate.run("cuda", CARD, 20) == ("the disk is full", FAILURE) and done[2:] == []


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A machine that seems to have a card, and a gate whose child is replaced by what is in `verdicts`."""
    calls, verdicts = [], {"triton": (None, VERDICT), "cuda": (None, VERDICT)}

    def run(name, device, seconds):
        calls.append(name)
        return verdicts[name]

    monkeypatch.setattr(gate, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test Card")
    monkeypatch.setenv("GENFT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(backends, "unavailable", lambda name, device, dtype: None)
    caches = gate.rejection, cards.identity, backends.default_for

    def new_process():
        for cached in caches:
            cached.cache_clear()

    new_process()
    yield types.SimpleNamespace(calls=calls, verdicts=verdicts, folder=tmp_path, new_process=new_process)
    monkeypatch.undo()
    new_process()


def test_auto_takes_kernels_for_the_tiled_form_once_they_have_passed(card):
    assert backends.default_for(CARD, torch.bfloat16, False) == "eager" and not card.calls
    for _ in range(3):
        assert backends.default_for(CARD, torch.bfloat16, True) == "triton"
    card.new_process()
    assert backends.default_for(CARD, torch.bfloat16, True) == "triton" and card.calls == ["triton"]
    assert backends.default_for(CPU, torch.bfloat16, True) == "eager"


def test_auto_passes_over_what_was_rejected_and_explain_says_why(card):
    card.verdicts["triton"] = "row (bfloat16): an error of 1", VERDICT
    assert backends.default_for(CARD, torch.bfloat16, True) == "cuda"
    text = backends.explain(CARD, torch.bfloat16)
    assert "eager for the factored form, cuda for the tiled form" in text
    assert "triton: available by name; rejected for auto: row (bfloat16): an error of 1" in text
    assert "cuda: available; passed the gate" in text
    card.verdicts["cuda"] = "it died", VERDICT
    for file in card.folder.glob("gate-*"):
        file.unlink()
    card.new_process()
    assert backends.default_for(CARD, torch.bfloat16, True) == "eager"
    assert backends.checked_request("triton", CARD, torch.bfloat16, tiled=True) == "triton"


def test_gate_that_takes_too_long_is_tried_again_and_then_kept_as_a_hang(card):
    card.verdicts["triton"] = "its gate takes longer than 20 s", FAILURE
    for _ in range(2):
        assert gate.rejection("triton", CARD) == "its gate takes longer than 20 s"
        card.new_process()
    for _ in range(2):
        kept = gate.rejection("triton", CARD)
        assert kept.startswith("its gate takes longer than 20 s; the last of 3 tries (delete ")
        card.new_process()
    assert card.calls == ["triton"] * 3
    (file,) = card.folder.glob("gate-*")
    assert f"delete {file} for" in kept
    file.unlink()
    card.new_process()
    assert gate.rejection("triton", CARD) == "its gate takes longer than 20 s" and len(card.calls) == 4


def test_gate_that_ends_in_its_second_try_is_kept(card):
    card.verdicts["triton"] = "its gate takes longer than 20 s", FAILURE
    assert gate.rejection("triton", CARD)
    card.verdicts["triton"] = None, VERDICT
    for _ in range(2):
        card.new_process()
        assert gate.rejection("triton", CARD) is None
    assert card.calls == ["triton"] * 2


def test_gate_that_could_not_run_leaves_no_word(card):
    card.verdicts["triton"] = "OutOfMemoryError (exit status 1)", NOTHING
    for _ in range(5):
        assert gate.rejection("triton", CARD) == "OutOfMemoryError (exit status 1)"
        card.new_process()
    assert not list(card.folder.glob("gate-*"))
    card.verdicts["triton"] = None, VERDICT
    assert gate.rejection("triton", CARD) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "3", json.dumps({"device": "x"}), '{"tries": "x"}'])
def test_damaged_verdict_is_asked_for_again(content, card):
    gate.rejection("triton", CARD)
    (file,) = card.folder.glob("gate-*")
    file.write_text(content)
    card.new_process()
    assert gate.rejection("triton", CARD) is None and card.calls == ["triton", "triton"]
    kept = json.loads(file.read_text())
    assert (kept["backend"], kept["card"], kept["rejected"]) == ("triton", "Test Card", None)


@pytest.mark.parametrize("name", backends.KERNEL_BACKENDS)
def test_kernels_need_a_card_that_is_new_enough(name, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backends.unavailable(name, CARD, torch.float16) == "it needs sm_80 or newer, and cuda:0 is sm_75"
