"""The gate: a kernel backend proves itself on a card before "auto" takes it there.

`python -m genft_kernels.backends.gate BACKEND DEVICE` compares its operations with plain PyTorch's, in a process of its
own, because an illegal access spoils a CUDA context. The verdict is kept in the folder of compiled code, for this card,
driver, versions and sources (docs/backends.md#choice).
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..philox import ROW_STREAM
from . import card

SECONDS = 20.0  # that a first forward may wait
TRIES = 3  # by as many processes, before a gate that takes longer counts as a hang
_PACKAGE = Path(__file__).parents[1]
_Backend = ModuleType | SimpleNamespace


@dataclasses.dataclass(frozen=True)
class Case:
    """Operands for every operation, for one dtype; more than a tile of each, and no whole tiles."""

    dtype: torch.dtype
    k: int
    activation: str
    dropout: float
    tokens: int
    n_in: int = 150  # rows of any matrix begin anywhere
    n_out: int = 214
    inner: str = "tanh"
    bias: bool = True  # in every stage; the row stage's is one unit more
    lies: str = "as it is"  # W in memory, or "transposed", "apart" (rows longer than W is wide), or "far apart"
    row: bool = True  # the row stage, too

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}, k {self.k}, {self.activation}, dropout {self.dropout}"


# Sizes whose rows begin where an asynchronous copy may; in 16 bits enough tokens for the wide tiles and for sums over
# them to be split, and more units than a slice of them; blocks enough for the larger ones and sums over W to be split,
# of what Triton compiles for the first case, since compiling is what takes long; and addresses of more than 32 bits.
CASES = (
    Case(torch.bfloat16, 32, "identity", 0.3, 200, 160, 224, inner="identity", bias=False),
    Case(torch.float16, 37, "gelu", 0.3, 1100, inner="relu", lies="transposed"),
    Case(torch.bfloat16, 80, "silu", 0.0, 1100, inner="gelu", lies="apart"),
    Case(torch.float32, 5, "leaky_relu", 0.3, 77),
    Case(torch.bfloat16, 32, "identity", 0.3, 200, 1904, 1104, bias=False, row=False),
    Case(torch.bfloat16, 32, "identity", 0.3, 9, 160, 16, bias=False, lies="far apart", row=False),
)
_LAYERS = 2
_FAR = 2**31 // 15 // 16 * 16 + 16  # elements from row to row


def examine(backend: _Backend, device: torch.device) -> str | None:
    """The first way in which a backend's operations fail on a device, in words; None if there is none."""
    cases = [case for case in CASES if case.lies != "far apart" or _has_room(case, device)]
    if device.type == "cuda":
        _compile(backend, device)
    for case in cases:
        runs = [_results(backend, case, case.dtype, device) for _ in range(3)]
        plain, exact = (_results(_eager(), case, dtype, device) for dtype in (case.dtype, torch.float64))
        for (name, found), (_, plains), (_, true), *others in zip(runs[0], plain, exact, *runs[1:], strict=True):
            # A chain of n additions in float32 is off by about sqrt(n) roundings, whatever a vendor's order gets.
            floor = torch.finfo(case.dtype).eps + torch.finfo(torch.float32).eps * case.tokens**0.5
            error, allowed = _error(found, true), 2 * _error(plains, true) + floor
            if not error <= allowed:  # NaN is no number that is small enough
                return f"{name} ({case}): an error of {error:.2g}, where {allowed:.2g} is allowed"
            if not all(torch.equal(found, other) for _, other in others):
                return f"{name} ({case}): three runs give different bits"
        if case.dropout and case.row and not _masks_are_equal(backend, case, device):
            return f"linear ({case}): dropout keeps other elements"
        if case.dtype.itemsize == 4 or case.tokens < 1000:
            continue
        if not abs(bias := _bias(backend, case, device)) <= 0.1:
            return f"linear ({case}): W + dW is rounded away from zero by {bias:.2g} of a rounding"
        if not abs((gain := _gain(backend, case, device)) - 1) <= 0.03:
            return f"linear ({case}): {gain:.2f} of a small update is left, where all of it should be"
    return None


def _compile(backend: _Backend, device: torch.device) -> None:
    """Run, side by side, the cases whose kernels differ: Triton compiles most of the time without Python's lock."""
    cases = [case for case in CASES if case.row]
    with ThreadPoolExecutor(len(cases), initializer=torch.cuda.set_device, initargs=(device,)) as threads:
        for _ in threads.map(lambda case: list(_results(backend, case, case.dtype, device)), cases):
            pass


def _eager() -> ModuleType:
    from .eager import operations

    return operations


def _random(case: Case, dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    """A source of the same random tensors, rounded to the case's dtype, each time."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * scale
        return numbers.to(case.dtype).to(device, dtype)

    return random


def _bytes_far_apart(case: Case) -> int:
    return ((case.n_out - 1) * _FAR + case.n_in) * case.dtype.itemsize


def _has_room(case: Case, device: torch.device) -> bool:
    """Whether a card has room for twice a W whose rows lie far apart; on a CPU only what is touched takes any."""
    return device.type != "cuda" or torch.cuda.mem_get_info(device)[0] > 2 * _bytes_far_apart(case)


@functools.lru_cache(maxsize=1)
def _memory(size: int, device: torch.device) -> torch.UntypedStorage:
    """Bytes that nothing is written to; the same for all runs."""
    return torch.UntypedStorage(size, device=device)


def _weight(case: Case, random: Callable[..., Tensor]) -> Tensor:
    weight = random(case.n_out, case.n_in, scale=case.n_in**-0.5)
    if case.lies == "transposed":
        return weight.t().contiguous().t()
    if case.lies == "apart":
        return weight.new_zeros(case.n_out, case.n_in + 10)[:, : case.n_in].copy_(weight)
    if case.lies == "far apart" and weight.dtype == case.dtype:
        memory = _memory(_bytes_far_apart(case), weight.device)
        return weight.new_empty(0).set_(memory, 0, weight.shape, (_FAR, 1)).copy_(weight)
    return weight


def _results(backend: _Backend, case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The results of every operation, forward and backward, by name."""
    random, seeds = _random(case, dtype, device), torch.tensor([7, -(2**40)], device=device)
    weights = [_weight(case, random)]
    if case.lies != "far apart":
        weights += [_weight(case, random) for _ in range(1, _LAYERS)]
        yield from _results_of_column(backend, case, random, weights)
    if case.row:
        yield from _results_of_row(backend, case, random, seeds)
    n_in, n_out, k = case.n_in, case.n_out, case.k
    x, dy = random(case.tokens, n_in), random(case.tokens, n_out)
    h, b, bias = random(n_in, k), random(n_out, k, scale=k**-0.5), random(n_out) if case.bias else None
    update = seeds[:1], 0.5, case.activation, case.dropout, ROW_STREAM
    yield "linear", backend.linear(x, weights[0], bias, h, b, *update)[0]
    if case.lies == "far apart":
        return
    dx, _, dh, db = backend.linear_backward(dy, x, weights[0], h, b, None, *update, [True, False, True, True])
    yield from (("linear_backward, x", dx), ("linear_backward, h", dh), ("linear_backward, b", db))


def _results_of_column(
    backend: _Backend, case: Case, random: Callable[..., Tensor], weights: list[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    n_in, n_out, k = case.n_in, case.n_out, case.k
    down, grad, pre = random(_LAYERS, k, n_in), random(_LAYERS, n_out, k), random(_LAYERS, n_out, k)
    yield "column", backend.column(weights, down, random(k) if case.bias else None, case.inner)[0]
    yield "column_backward", backend.column_backward(grad, weights, pre, case.inner, [True, False])[0]


def _results_of_row(
    backend: _Backend, case: Case, random: Callable[..., Tensor], seeds: Tensor
) -> Iterator[tuple[str, Tensor]]:
    n_in, n_out, k, k1 = case.n_in, case.n_out, case.k, case.k + case.bias
    left, right = random(_LAYERS, n_out, k1), random(_LAYERS, n_in, k1, scale=k**-0.5)
    down, pre, grad = random(_LAYERS, k, n_out, scale=n_out**-0.5), random(_LAYERS, n_in, k), random(_LAYERS, n_in, k)
    stages = seeds, case.activation, case.dropout, case.inner
    yield "row", backend.row(left, right, down, random(k) if case.bias else None, *stages)[0]
    grads = backend.row_backward(grad, left, right, down, pre, *stages, [True] * 4)
    yield from zip(("row_backward, left", "row_backward, right", "row_backward, down"), grads[:3], strict=True)


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def _masks_are_equal(backend: _Backend, case: Case, device: torch.device) -> bool:
    """Whether an update of equal elements, of which no rounding makes zero, loses those that eager's loses."""
    random, seed = _random(case, case.dtype, device), torch.tensor([-3], device=device)
    h, b = torch.ones_like(random(case.n_in, case.k)), torch.ones_like(random(case.n_out, case.k))
    each, weight = torch.eye(case.n_in, dtype=case.dtype, device=device), _weight(case, random).zero_()
    settings = None, h, b, seed, 1.0, case.activation, case.dropout, ROW_STREAM
    found, expected = (operations.linear(each, weight, *settings)[0] != 0 for operations in (backend, _eager()))
    return torch.equal(found, expected)


def _bias(backend: _Backend, case: Case, device: torch.device) -> float:
    """How far the elements of W + dW that dropout keeps are rounded away from zero on the whole, in mean roundings."""
    seed, results = torch.tensor([2**40 + 3], device=device), []
    for operations, dtype in ((backend, case.dtype), (_eager(), torch.float64)):
        random = _random(case, dtype, device)
        weight, h, b = _weight(case, random), random(case.n_in, case.k), random(case.n_out, case.k)
        each = torch.eye(case.n_in, dtype=dtype, device=device)
        settings = 1e-3, case.activation, case.dropout, ROW_STREAM
        results.append(operations.linear(each, weight, None, h, b, seed, *settings)[0].t())  # [out, in]
    folded, exact = results
    kept = exact != weight
    off = (folded.double() - exact)[kept]
    return ((off * exact[kept].sign()).mean() / off.abs().mean()).item()


def _gain(backend: _Backend, case: Case, device: torch.device) -> float:
    """<y - y0, d> / <d, d> for an update d of a thousandth of y0 (docs/method.md#precision)."""
    random, seed = _random(case, case.dtype, device), torch.tensor([3], device=device)
    weight, x = _weight(case, random), random(2000, case.n_in)
    h, b = random(case.n_in, case.k), random(case.n_out, case.k)
    wide = [each.double() for each in (x, weight, h, b)]
    frozen, settings = wide[0] @ wide[1].t(), (case.activation, case.dropout, ROW_STREAM)
    update = _eager().linear(*wide[:2], None, *wide[2:], seed, 1.0, *settings)[0] - frozen
    scale = 1e-3 * (frozen.norm() / update.norm()).item()
    y, _ = backend.linear(x, weight, None, h, b, seed, scale, *settings)
    return ((y.double() - frozen) * update).sum().item() / (scale * update.square().sum().item())


# --- the verdict ----------------------------------------------------------------------------------------------------


class Outcome(enum.Enum):
    """How a run of the gate ended."""

    VERDICT = enum.auto()  # of the kernels: the same would come out again
    FAILURE = enum.auto()  # a hang, a death or a failed compilation, which may be the kernels' or chance
    NOTHING = enum.auto()  # the machine would not have it: a card without room or in use, a process that was stopped


_REJECTED, _FAILED = 3, 4  # exit statuses of the child; Python's own, 1, is that of a child that never came to examine
_STOPPED = {-getattr(signal, name, 0) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGKILL")}


@functools.cache
def rejection(backend: str, device: torch.device) -> str | None:
    """Why `backend` may not be chosen on a CUDA device, or None if it passed the gate, now or before."""
    try:
        path = card.file(f"gate-{backend}", device)
    except (OSError, RuntimeError):
        return run(backend, device, SECONDS)[0]  # there is no folder to keep it in
    known: dict[str, Any] = {}
    with contextlib.suppress(ValueError):  # damaged, another user's, or not there yet
        known = card.read(path)
    if "rejected" in known:
        rejected: str | None = known["rejected"]
        return rejected
    reason, outcome = run(backend, device, SECONDS)
    if outcome is Outcome.NOTHING:
        return reason  # the next process asks again
    verdict: dict[str, object] = {"backend": backend, **card.identity(device)}
    if outcome is Outcome.VERDICT:
        verdict["rejected"] = reason
    else:  # compiling may have taken so long, of which the next process finds a part done; a hang never ends
        verdict["tries"] = tries = known.get("tries", 0) + 1 if isinstance(known.get("tries", 0), int) else 1
        if tries == TRIES:
            verdict["rejected"] = reason = f"{reason}; the last of {TRIES} tries (delete {path} for more)"
    with contextlib.suppress(OSError):  # the next process asks again
        card.write(path, verdict)
    return reason


def run(backend: str, device: torch.device, seconds: float) -> tuple[str | None, Outcome]:
    """(the reason for which the gate rejects, or None, what that tells), by a child process.

    CUDA kernels are compiled before the child starts, with the time that takes.
    """
    if backend == "cuda":
        from .compiled.run import BuildError
        from .cuda import extension

        try:
            extension.load()
        except BuildError as error:
            return str(error), Outcome.FAILURE  # it may have taken half an hour, which not every process shall wait
    command = [sys.executable, "-m", __name__, backend, str(device)]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # which determinism asks for
    try:
        done = subprocess.run(
            command, timeout=seconds, capture_output=True, text=True, cwd=_PACKAGE.parent, env=environment
        )
    except subprocess.TimeoutExpired:
        return f"its gate takes longer than {seconds:.0f} s", Outcome.FAILURE
    except OSError as error:
        return f"its gate cannot be run: {error}", Outcome.NOTHING
    if done.returncode == 0:
        return None, Outcome.VERDICT
    said = [line for line in (done.stdout + done.stderr).strip().splitlines() if line.strip()]
    reason = said[-1] if said else "its gate died"
    if done.returncode == _REJECTED:
        return reason, Outcome.VERDICT
    of_the_machine = done.returncode == 1 or done.returncode in _STOPPED
    return f"{reason} (exit status {done.returncode})", Outcome.NOTHING if of_the_machine else Outcome.FAILURE


def main() -> None:
    """Examine the backend and the device that the arguments name; the exit status tells `run` how that ended."""
    from . import lacks_memory, load

    name, device = sys.argv[1], torch.device(sys.argv[2])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # a context
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    backend = load(name)
    try:
        reason = examine(backend, device)
    except Exception as error:
        if lacks_memory(error):
            raise
        traceback.print_exc()
        sys.exit(_FAILED)
    if reason is not None:
        print(reason, file=sys.stderr)
        sys.exit(_REJECTED)


if __name__ == "__main__":
    main()
