"""The experts modules of transformers 5, told without importing it: classes of its experts interface.

`use_experts_implementation` promises of a class that its stacked parameters, its flags and its gate are all that there
is to it, so that any implementation may compute it. A class without that promise is refused, and not guessed.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..checks import SUPPORTED_DTYPES
from .layout import Layout

_INTERFACE = "transformers.integrations.moe"


def is_experts(module: nn.Module) -> bool:
    """Whether its class is one of the interface."""
    forward = type(module).forward
    return getattr(forward, "__globals__", {}).get("__name__") == _INTERFACE and hasattr(forward, "__wrapped__")


def projections(experts: nn.Module) -> dict[str, int]:
    """The stacked parameters by name, each with the number of halves that one expert's matrix consists of."""
    gated = getattr(experts, "has_gate", True)  # all were, before there was the flag
    return {"gate_up_proj": 2, "down_proj": 1} if gated else {"up_proj": 1, "down_proj": 1}


def has_norm(experts: nn.Module) -> bool:
    """Whether `post_expert_norm` follows its projections, as since transformers 5.20 it may."""
    return getattr(experts, "has_post_expert_norm", False)


def layout_of(experts: nn.Module, name: str) -> Layout:
    """How the parameter `name` of an experts module is stored.

    Raises:
        TypeError, ValueError: it cannot be adapted; the message says why.
    """
    kind = type(experts).__name__
    if not is_experts(experts) and any(word in kind.lower() for word in ("router", "gate")):
        raise TypeError(f"{kind} is a router, which stays frozen: name the parameters of the experts")
    if not is_experts(experts):
        raise TypeError(
            f"{kind} is no experts class of transformers' interface (use_experts_implementation): how its parameters "
            "are used is not known"
        )
    halves = projections(experts)
    if name not in halves:
        raise TypeError(f"{kind} has experts' weights in {', '.join(halves)} only: what else it has stays frozen")
    flags: Any = experts
    weight = experts._parameters.get(name)
    if weight is None:
        raise TypeError("it is not a parameter but computed (by a parametrization)")
    if weight.dim() != 3 or 0 in weight.shape:
        raise ValueError(f"it must be [experts, out, in], none of them 0, got shape {tuple(weight.shape)}")
    if weight.device.type == "meta":
        raise ValueError("it is on the meta device: the update is generated from its values, so load them first")
    if weight.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"it has dtype {weight.dtype}: quantised experts are not supported")
    count, *matrix = weight.shape
    if halves[name] == 2 and not hasattr(experts, "is_concatenated"):
        raise TypeError("this version of transformers does not tell how its gate and up lie: install 5.7 or newer")
    in_features, out_features = matrix if flags.is_transposed else reversed(matrix)
    if out_features % halves[name]:
        raise ValueError(f"its {out_features} rows cannot be cut into gate and up")
    interleaved = halves[name] == 2 and not flags.is_concatenated
    return Layout(count, out_features, in_features, halves[name], interleaved, flags.is_transposed)
