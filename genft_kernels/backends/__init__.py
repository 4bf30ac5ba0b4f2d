"""Which backend computes: the choice, its reasons, and the loaded module.

Each backend is one module that offers the operations of docs/method.md#kernels under the same names: `column`, `row`,
`linear` and their `_backward`s. "reference" is the specification; it is chosen only by name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Iterable
from types import ModuleType
from typing import Protocol

import torch

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# In the order in which "auto" asks them.
OPERATION_BACKENDS = ("eager", "triton", "cuda")
BACKENDS = ("auto", *OPERATION_BACKENDS, "reference")


class Explains(Protocol):
    """What has something to add to `explain`."""

    def explain(self) -> list[str]:
        """Lines."""


def unavailable(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an operation backend cannot compute in `dtype` on `device`, or None if it can."""
    if name == "eager":
        return None  # plain PyTorch runs wherever PyTorch does
    if name == "cuda":
        return load(name).unavailable(device, dtype)
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if dtype not in TRITON_DTYPES:
        return f"it does not compute in {dtype}"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"it needs a CUDA device, not {device.type}"


# torch.compile takes the answer as it is, or it would trace imports and the search for a compiler. It is what
# torch.compiler.assume_constant_result sets, which imports torch._dynamo and with it Triton.
unavailable._dynamo_marked_constant = True


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is a backend of this version."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")


def choose(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that computes in `dtype` on `device`; only "auto" ever becomes another.

    Raises:
        ValueError: no such backend.
        RuntimeError: the one asked for cannot run here; the message says why.
    """
    check_name(requested)
    if requested == "reference":
        return requested
    candidates = OPERATION_BACKENDS if requested == "auto" else (requested,)
    reasons = {}
    for name in candidates:
        reasons[name] = unavailable(name, device, dtype)
        if reasons[name] is None:
            return name
    raise RuntimeError("; ".join(f"backend {name!r} cannot run on {device}: {why}" for name, why in reasons.items()))


@functools.cache
def load(name: str) -> ModuleType:
    """The module of an operation backend."""
    return importlib.import_module(f".{name}.operations", __name__)


def explain(
    device: str | torch.device | None = None, dtype: torch.dtype = torch.float32, groups: Iterable[Explains] = ()
) -> str:
    """What "auto" picks for `dtype` on `device` and why, a line for each backend.

    `device` defaults to the first CUDA device, or the CPU where there is none. `groups` are those of a model's layers
    (`genft_kernels.explain(model)` finds them): which layers are generated together, and why others are not.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    lines = [f'backend="auto" on {device}: {choose("auto", device, dtype)}']
    for name in OPERATION_BACKENDS:
        reason = unavailable(name, device, dtype)
        lines.append(f"  {name}: {_REMARKS[name] if reason is None else f'unavailable: {reason}'}")
    lines.append("  reference: available; the specification, materialises every matrix; only by name")
    explained = [line for group in groups for line in group.explain()]
    return "\n".join([*lines, *(["generation:"] if explained else []), *(f"  {line}" for line in explained)])


_REMARKS = {
    "eager": "available; plain PyTorch",
    "triton": "available by name; auto does not take it before a GPU has measured it",
    "cuda": "available by name; auto does not take it before a GPU has measured it",
}
