"""Which backend computes: the choice, its reasons, and the loaded module.

Each backend is one module that offers the operations of docs/method.md#kernels under the same names: `column`, `row`,
`linear` and their `_backward`s. "reference" is the specification; it is chosen only by name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterable
from types import ModuleType
from typing import Any, Protocol

import torch

from .. import _torch_private
from ..arguments import check_type, shown
from . import choices
from .names import BACKENDS, KERNEL_DTYPES
from .names import KERNEL_BACKENDS as KERNEL_BACKENDS
from .names import OPERATION_BACKENDS as OPERATION_BACKENDS

# Not chosen yet: an operation chooses where it runs, where it knows its sizes. A compiled graph serves all lengths.
# These strings travel through the schemas of operations in a backend's place.
_OPEN = {False: "auto, factored", True: "auto, tiled"}

_NO_MEMORY = ("out of memory", "ALLOC_FAILED")

_set_aside: dict[tuple[str, torch.device], str] = {}  # (backend, device): why "auto" takes it no more in this process


class LaunchError(RuntimeError):
    """A kernel could not be started; the message names it."""


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that a card had no memory left, which is no fault of kernels: each library has its own."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _NO_MEMORY)


class Explains(Protocol):
    """A backend that has something to add to `explain`."""

    def explain(self) -> list[str]:
        """Lines."""


@_torch_private.constant_in_graphs  # or torch.compile would trace imports and the search for a compiler
def unavailable(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an operation backend cannot compute in `dtype` on `device`, or None if it can."""
    if name == "eager":
        return None  # plain PyTorch runs wherever PyTorch does
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if dtype not in KERNEL_DTYPES:
        return f"it does not compute in {dtype}"
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return _device_reason(name, device)


def _device_reason(name: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs sm_80 or newer, and {device} is sm_{capability[0]}{capability[1]}"
    return load(name).unavailable_reason() if name == "cuda" else None


@_torch_private.constant_in_graphs
def rejection(name: str, device: torch.device) -> str | None:
    """Why "auto" does not take a backend of kernels on `device` where it could run, or None if it does.

    The first call for a card runs the gate, which takes up to 20 s.
    """
    if device.type != "cuda":
        return "auto takes kernels on CUDA devices only"
    from . import gate

    return gate.rejection(name, device if device.index is not None else torch.device("cuda", 0))


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is a backend of this version."""
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {shown(name)}")


def checked_request(requested: str, device: torch.device, dtype: torch.dtype, tiled: bool = False) -> str:
    """The backend to hand to the operations: the one that computes in `dtype` on `device`, if one is asked for by name.

    "auto" stays open until an operation runs (`resolved`); only it ever becomes another.

    Raises:
        ValueError: no such backend.
        RuntimeError: the one asked for cannot run here; the message says why.
    """
    check_name(requested)
    if requested == "auto":
        return _OPEN[tiled]
    if requested != "reference" and (reason := unavailable(requested, device, dtype)) is not None:
        raise RuntimeError(f"backend {requested!r} cannot run on {device}: {reason}")
    return requested


def is_open(backend: str) -> bool:
    """Whether an operation has to choose for itself."""
    return backend in _OPEN.values()


@_torch_private.constant_in_graphs
def by_pytorch(backend: str, device: torch.device) -> bool:
    """Whether an operation in the factored form is plain PyTorch's, whatever its sizes."""
    return backend == "eager" or (backend == _OPEN[False] and not choices.table(device))


def resolved(backend: str, device: torch.device, dtype: torch.dtype, operation: str, args: tuple[Any, ...]) -> str:
    """The backend of an operation that has to choose: the fastest for its shape where measured, else `default_for`."""
    tiled = backend == _OPEN[True]
    choices.note(operation, tiled, args)
    if (table := choices.table(device)) and (shape := choices.shape_of(operation, tiled, args)) is not None:
        name = table.get(str(shape))
        if name is not None and may_choose(name, device, dtype):
            return name
    return default_for(device, dtype, tiled)


def may_choose(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether "auto" may take an operation backend: it can run, and has passed the gate if it has kernels."""
    return name == "eager" or _refusal(name, device, dtype) is None


@functools.cache
def default_for(device: torch.device, dtype: torch.dtype, tiled: bool) -> str:
    """The winner by counted launches and bytes: "eager", whose products are a vendor's, but for the tiled form on a
    CUDA device. There it is the first backend of kernels that can run and has passed the gate on that card."""
    kernels = KERNEL_BACKENDS if tiled and device.type == "cuda" else ()
    return next((name for name in kernels if may_choose(name, device, dtype)), "eager")


def set_aside(name: str, device: torch.device, operation: str, error: Exception) -> None:
    """Have "auto" take a backend no more on `device` in this process, and warn once of the kernel that failed there."""
    if (name, device) not in _set_aside:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        _set_aside[name, device] = f"set aside in this process: {operation}: {error}"
        warnings.warn(
            f'backend="auto" goes on without {name!r} on {device} ({where}), because {operation} failed there: {error}',
            RuntimeWarning,
            stacklevel=2,
        )
    default_for.cache_clear()


def _refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why "auto" does not take a backend of kernels, in the words of `explain`."""
    if (reason := unavailable(name, device, dtype)) is not None:
        return f"unavailable: {reason}"
    if (reason := _set_aside.get((name, device)) or rejection(name, device)) is not None:
        return f"available by name; rejected for auto: {reason}"
    return None


@functools.cache
def load(name: str) -> ModuleType:
    """The module of an operation backend."""
    return importlib.import_module(f".{name}.operations", __name__)


def explain(
    device: str | torch.device | None = None, dtype: torch.dtype = torch.float32, groups: Iterable[Explains] = ()
) -> str:
    """The pick of "auto" for `dtype` on `device` and why, a line for each backend.

    `device` defaults to the first CUDA device, or the CPU where there is none. `groups` are those of a model's layers
    (`genft_kernels.explain(model)` finds them): which layers are generated together, and why others are not.
    """
    check_type("device", device, (torch.device, str, int), optional=True)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)  # as tensors name it, whose backends are asked for
    factored, tiled = (default_for(device, dtype, form) for form in (False, True))
    auto = factored if factored == tiled else f"{factored} for the factored form, {tiled} for the tiled form"
    measured = f"; but for {len(table)} measured shapes" if (table := choices.table(device)) else ""
    lines = [f'backend="auto" on {device}: {auto}{measured}', "  eager: available; plain PyTorch"]
    lines += [f"  {name}: {_refusal(name, device, dtype) or 'available; passed the gate'}" for name in KERNEL_BACKENDS]
    lines.append("  reference: available; the specification, materialises every matrix; only by name")
    explained = [line for group in groups for line in group.explain()]
    return "\n".join([*lines, *(["generation:"] if explained else []), *(f"  {line}" for line in explained)])
