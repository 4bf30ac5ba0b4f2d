"""The six elementwise functions of the method, and their gradients by PyTorch's own one-pass kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

LEAKY_SLOPE = 0.01

ACTIVATIONS = ("identity", "relu", "leaky_relu", "gelu", "silu", "tanh")

_aten = torch.ops.aten
_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, LEAKY_SLOPE),
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
_IN_PLACE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu_,
    "leaky_relu": lambda z: F.leaky_relu_(z, LEAKY_SLOPE),
    "gelu": _aten.gelu_,
    "silu": _aten.silu_,
    "tanh": torch.tanh_,
}


def activate(name: str, z: torch.Tensor) -> torch.Tensor:
    """The activation of z, same shape and dtype. GELU is the exact one, leaky_relu has slope 0.01."""
    return z if name == "identity" else _FUNCTIONS[name](z)


def activate_(name: str, z: torch.Tensor) -> torch.Tensor:
    """`activate` in place."""
    return z if name == "identity" else _IN_PLACE[name](z)


def activation_backward(name: str, grad: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
    """grad * activation'(z), where z is what the activation was applied to; of no use to the identity."""
    return grad if name == "identity" else _gradient(name, grad, z, torch.empty_like(grad))


def activation_backward_(name: str, grad: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """`activation_backward` in place, on `grad`."""
    return grad if name == "identity" else _gradient(name, grad, z, grad)


def _gradient(name: str, grad: torch.Tensor, z: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    assert z is not None  # only the identity needs none
    match name:
        case "relu":
            return _aten.threshold_backward.grad_input(grad, z, 0, grad_input=out)
        case "leaky_relu":
            return _aten.leaky_relu_backward.grad_input(grad, z, LEAKY_SLOPE, False, grad_input=out)
        case "gelu":
            return _aten.gelu_backward.grad_input(grad, z, grad_input=out)
        case "silu":
            return _aten.silu_backward.grad_input(grad, z, grad_input=out)
        case "tanh":
            return _aten.tanh_backward.grad_input(grad, torch.tanh(z), grad_input=out)
        case _:
            raise ValueError(f"unknown activation {name!r}; there are {', '.join(ACTIVATIONS)}")
