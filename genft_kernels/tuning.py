"""Measuring on this card which backend is the fastest for a model's layers, for `backend="auto"` to choose by.

The operations of a training step are taken down as a layer calls them, then each is timed on every backend
(docs/backends.md#choice).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from . import backends, ops
from .arguments import check_type, is_finite, is_integer, shown
from .backends import choices
from .together import updated_linear
from .units import GenFTUpdate, refresh

SECONDS_A_SHAPE, SECONDS = 0.3, 60.0
_COLD_BYTES = (64 << 20, 256 << 20)  # more than the caches of a CPU, and of a card, hold


class Measured(NamedTuple):
    """Median milliseconds of a shape's operations on each backend."""

    shape: str
    milliseconds: Mapping[str, float]

    @property
    def fastest(self) -> str:
        return min(self.milliseconds, key=self.milliseconds.__getitem__)

    def __str__(self) -> str:
        times = ", ".join(f"{name} {value:.3f} ms" for name, value in self.milliseconds.items())
        return f"{self.shape}: {times}: {self.fastest}"


def tune(model: nn.Module, tokens: int | Iterable[int] = (8192, 128), *, seconds: float = SECONDS) -> list[Measured]:
    """Measure every backend on the shapes of a model's layers, and keep which is the fastest for `backend="auto"`.

    What is measured is printed as it is found, a line for each shape, and kept for this card, driver and versions in
    the folder of compiled code. It holds from the next process on; in this one, if no layer has computed yet. The
    model and its gradients stay as they are. Call it within autocast if the model trains so.

    Args:
        model: of `apply_genft`, or one that has `GenFTLinear` layers; those with `backend="auto"` are measured.
        tokens: how many tokens a step has, one number or several; each stands for all down to half of it.
        seconds: to spend in all, `math.inf` without an end; what is left then is not measured, and said to be so.
            They begin when the gates have run and what a backend compiles on its first use is there.

    Returns:
        What was measured, one for each shape.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model has no layer with `backend="auto"`; a number of tokens or of seconds is none.
        OSError: what was measured cannot be kept.
    """
    check_type("model", model, nn.Module)
    try:
        counts: list[Any] = [tokens] if is_integer(tokens) else list(tokens)  # type: ignore[arg-type]
    except TypeError:  # also an array of no dimension, which has the method
        counts = [tokens]
    wrong = [count for count in counts if not is_integer(count) or count < 1]
    if wrong or not counts:
        raise ValueError(f"tokens must be positive integers, one or more, got {shown(wrong[0] if wrong else tokens)}")
    if seconds != math.inf and not (is_finite(seconds) and seconds >= 0):
        raise ValueError(f"seconds must be a number of at least 0, got {shown(seconds)}")
    updates = _one_of_each_shape(model)
    found: dict[torch.device, dict[str, Measured]] = {}
    try:
        for update in updates:
            for of_shape in _calls(update, 1).values():  # compiles
                _names(update.stored_weight.device, of_shape)  # has gates run
        deadline = time.monotonic() + float(seconds)  # one of numpy may be of float32, whose clock is coarse
        for update in updates:
            device = update.stored_weight.device
            known: dict[str, Measured] = {}
            for count in sorted({choices.power_of_two(int(count)) for count in counts}):
                calls = {shape: each for shape, each in _calls(update, count).items() if shape not in known}
                for shape, of_shape in calls.items():
                    if time.monotonic() > deadline:
                        print(f"{shape}: not measured, {seconds:g} s are over", flush=True)
                        continue
                    known[shape] = Measured(shape, _time(device, of_shape))
                    print(known[shape], flush=True)
            found.setdefault(device, {}).update(known)
    finally:
        refresh(model)
    for of_device, known in found.items():
        if known:
            path = choices.save(of_device, {shape: each.fastest for shape, each in known.items()})
            print(f"kept in {path}")
    return [each for known in found.values() for each in known.values()]


def _one_of_each_shape(model: nn.Module) -> list[GenFTUpdate]:
    found: dict[Any, GenFTUpdate] = {}
    for module in model.modules():
        if isinstance(module, GenFTUpdate) and module.backend == "auto" and not module.merged:
            weight = module.stored_weight
            if len(weight.shape) != 2:  # stacked experts, whose products are those of `linear` for each
                continue
            key = weight.device, weight.dtype, weight.shape, module.blocks, module.config
            found.setdefault(str(key), module)
    if not found:
        raise ValueError('the model has no GenFT layers with backend="auto" that can be measured')
    return list(found.values())


def _calls(update: GenFTUpdate, tokens: int) -> dict[str, list[choices.Call]]:
    """The operations, with their arguments, of a training step and an evaluation of a layer, by their shape."""
    weight, training = update.frozen_weight, update.training
    trained = [tensor for tensor in update.source().thin if tensor.requires_grad]
    devices = [weight.device] if weight.device.type == "cuda" else []
    found: dict[str, list[choices.Call]] = {}
    with torch.random.fork_rng(devices):
        x = torch.randn(tokens, weight.shape[1], device=weight.device, dtype=weight.dtype, requires_grad=True)
        try:
            for mode in (True, False):
                nn.Module.train(update, mode)
                with choices.noting() as calls, torch.set_grad_enabled(mode):
                    y = updated_linear(x, weight, None, [update])
                    if mode:
                        torch.autograd.grad(y, [x, *trained], torch.randn_like(y), allow_unused=True)
                of_mode: dict[str, list[choices.Call]] = {}
                for call in calls:
                    of_mode.setdefault(str(call.shape), []).append(call)
                found = {**of_mode, **found}
        finally:
            nn.Module.train(update, training)
    return found


@torch.no_grad()
def _time(device: torch.device, calls: list[choices.Call]) -> dict[str, float]:
    """Median milliseconds of the calls, one after the other, on each backend that runs here; all take turns."""
    names = _names(device, calls)
    cold = torch.empty(_COLD_BYTES[device.type == "cuda"], dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        _run(name, calls)  # compiles for the shape
    begin = time.monotonic()
    while not times[names[0]] or time.monotonic() - begin < SECONDS_A_SHAPE:
        for name in names:
            cold.zero_()
            times[name].append(_milliseconds(device, name, calls))
    return {name: statistics.median(each) for name, each in times.items()}


def _names(device: torch.device, calls: list[choices.Call]) -> list[str]:
    """The backends that run such calls here."""
    dtype = calls[0].shape.dtype
    return [name for name in backends.OPERATION_BACKENDS if backends.may_choose(name, device, dtype)]


def _run(name: str, calls: list[choices.Call]) -> None:
    for _, operation, args in calls:
        ops.compute(name, operation, *args)


def _milliseconds(device: torch.device, name: str, calls: list[choices.Call]) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        _run(name, calls)
        return 1e3 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):  # an event is recorded on the current card's stream
        start.record()
        _run(name, calls)
        end.record()
    end.synchronize()
    return start.elapsed_time(end)
