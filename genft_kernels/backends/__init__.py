"""Which backend computes: the choice, its reasons, and the loaded module.

Each backend is one module that offers the operations of design section 4 under the same names: `column`, `row`,
`linear` and their `_backward`s. "reference" is the specification; it is chosen only by name.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

# In the order in which "auto" asks them.
OPERATION_BACKENDS = ("eager",)
BACKENDS = ("auto", *OPERATION_BACKENDS, "reference")


def unavailable(name: str, device: torch.device) -> str | None:
    """Why an operation backend cannot run on `device`, or None if it can."""
    if name == "eager":
        return None  # plain PyTorch runs wherever PyTorch does
    return f"unknown backend {name!r}"


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is a backend of this version."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")


def choose(requested: str, device: torch.device) -> str:
    """The backend that computes for tensors on `device`; only "auto" ever becomes another.

    Raises:
        ValueError: no such backend.
        RuntimeError: the one asked for cannot run here; the message says why.
    """
    check_name(requested)
    if requested == "reference":
        return requested
    candidates = OPERATION_BACKENDS if requested == "auto" else (requested,)
    reasons = {name: unavailable(name, device) for name in candidates}
    for name, reason in reasons.items():
        if reason is None:
            return name
    raise RuntimeError("; ".join(f"backend {name!r} cannot run on {device}: {why}" for name, why in reasons.items()))


def load(name: str) -> ModuleType:
    """The module of an operation backend."""
    return importlib.import_module(f".{name}", __name__)


def explain(device: str | torch.device | None = None) -> str:
    """What "auto" picks on `device` and why, a line for each backend.

    `device` defaults to the first CUDA device, or the CPU where there is none.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    lines = [f'backend="auto" on {device}: {choose("auto", device)}']
    for name in OPERATION_BACKENDS:
        reason = unavailable(name, device)
        lines.append(f"  {name}: {'available' if reason is None else f'unavailable: {reason}'}")
    lines.append("  reference: available; the specification, materialises every matrix; only by name")
    return "\n".join(lines)
