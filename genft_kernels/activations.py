"""The six elementwise functions of the method, and their gradients by PyTorch's own one-pass kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

LEAKY_SLOPE = 0.01

ACTIVATIONS = ("identity", "relu", "leaky_relu", "gelu", "silu", "tanh")

_aten = torch.ops.aten


def activate(name: str, z: torch.Tensor) -> torch.Tensor:
    """The activation of z, same shape and dtype. GELU is the exact one, leaky_relu has slope 0.01."""
    match name:
        case "identity":
            return z
        case "relu":
            return F.relu(z)
        case "leaky_relu":
            return F.leaky_relu(z, LEAKY_SLOPE)
        case "gelu":
            return F.gelu(z)
        case "silu":
            return F.silu(z)
        case "tanh":
            return torch.tanh(z)
    raise ValueError(f"unknown activation {name!r}; there are {', '.join(ACTIVATIONS)}")


def activation_backward(name: str, grad: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """grad * activation'(z), where z is what the activation was applied to."""
    match name:
        case "identity":
            return grad
        case "relu":
            return _aten.threshold_backward(grad, z, 0)
        case "leaky_relu":
            return _aten.leaky_relu_backward(grad, z, LEAKY_SLOPE, False)
        case "gelu":
            return _aten.gelu_backward(grad, z)
        case "silu":
            return _aten.silu_backward(grad, z)
        case "tanh":
            return _aten.tanh_backward(grad, torch.tanh(z))
    raise ValueError(f"unknown activation {name!r}; there are {', '.join(ACTIVATIONS)}")
