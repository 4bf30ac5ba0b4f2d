"""The column stage: skinny products over W (docs/method.md#two-products)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...activations import activate, activation_backward
from .products import lie_in_columns, sum_of_rows


def column(weights: list[Tensor], down: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None]:
    """h = phi(W A^T + a)  [L, out, k], for L layers; the transpose of a contiguous tensor where W's lie in columns."""
    layers, (out_features, _), k = len(weights), weights[0].shape, down.shape[1]
    if lie_in_columns(weights):
        z = down.new_empty((layers, k, out_features)).mT
    else:
        z = down.new_empty((layers, out_features, k))
    for weight, a, out in zip(weights, down, z, strict=True):
        if bias is None:
            torch.mm(weight.to(a.dtype), a.t(), out=out)
        else:
            torch.addmm(bias, weight.to(a.dtype), a.t(), out=out)
    return activated(z, activation)


def column_backward(
    grad: Tensor, weights: list[Tensor], pre: Tensor | None, activation: str, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dA = dZ^T W  [L, k, in], da = sum of dZ  [k]."""
    need_down, need_bias = needs
    dz = activation_backward(activation, grad, pre)  # [L, out, k]
    ddown = None
    if need_down:
        ddown = dz.new_empty((len(weights), dz.shape[2], weights[0].shape[1]))
        for weight, layer_dz, out in zip(weights, dz, ddown, strict=True):
            torch.mm(layer_dz.t(), weight.to(dz.dtype), out=out)
    return ddown, sum_of_rows(dz.flatten(0, 1)) if need_bias else None


def activated(z: Tensor, activation: str) -> tuple[Tensor, Tensor | None]:
    """(activation of z, z where its gradient will want it)."""
    return activate(activation, z), None if activation == "identity" else z
