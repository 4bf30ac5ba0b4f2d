"""The column stage: skinny products over W (docs/method.md#two-products)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...activations import activate, activation_backward
from .products import lie_in_columns, sum_of_rows

# Of frozen weights that a GPU takes side by side: a copy of small ones costs less than a launch for each.
_SIDE_BY_SIDE = 64 << 20  # bytes


def column(weights: list[Tensor], down: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None]:
    """h = phi(W A^T + a)  [L, out, k], for L layers; the transpose of a contiguous tensor where W's lie in columns."""
    layers, (out_features, _), k = len(weights), weights[0].shape, down.shape[1]
    if layers == 1:  # which a compiler can look into, as it cannot where products are written into parts of a result
        return activated(_product(weights[0].to(down.dtype), down[0].mT, bias)[None], activation)
    if lie_in_columns(weights):
        z = down.new_empty((layers, k, out_features)).mT
    else:
        z = down.new_empty((layers, out_features, k))
    for w, a, out in _batches(weights, down, z):
        one = w.dim() == 2
        if bias is None:
            (torch.mm if one else torch.bmm)(w, a.mT, out=out)
        else:
            (torch.addmm if one else torch.baddbmm)(bias, w, a.mT, out=out)
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
        for w, of_layers, out in _batches(weights, dz, ddown):
            (torch.mm if w.dim() == 2 else torch.bmm)(of_layers.mT, w, out=out)
    return ddown, sum_of_rows(dz.flatten(0, 1)) if need_bias else None


def _product(weight: Tensor, thin: Tensor, bias: Tensor | None) -> Tensor:
    """weight @ thin + bias; it lies in columns where W does."""
    if lie_in_columns([weight]):
        left, right = thin.t(), weight.t()
        return (left @ right if bias is None else torch.addmm(bias[:, None], left, right)).t()
    return weight @ thin if bias is None else torch.addmm(bias, weight, thin)


def _batches(weights: list[Tensor], thin: Tensor, results: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(W in the dtype of `thin`, its part of that, its part of `results`): of one layer at a time, or, where they are
    small and on a GPU, of several, each with a leading dimension."""
    together = min(_together(weights[0], thin), len(weights))
    if together < 2:
        for weight, of_layer, result in zip(weights, thin, results, strict=True):
            yield weight.to(thin.dtype), of_layer, result
        return
    for start in range(0, len(weights), together):
        some = slice(start, start + together)
        if weights[0].stride(0) == 1:  # what lies in columns is copied as it lies
            stack = torch.stack([weight.t() for weight in weights[some]]).mT
        else:
            stack = torch.stack(weights[some])
        yield stack.to(thin.dtype), thin[some], results[some]


def _together(weight: Tensor, thin: Tensor) -> int:
    """How many weights may be put side by side."""
    size = weight.shape.numel() * max(weight.dtype.itemsize, thin.dtype.itemsize)
    return _SIDE_BY_SIDE // size if thin.device.type == "cuda" else 1


def activated(z: Tensor, activation: str) -> tuple[Tensor, Tensor | None]:
    """(activation of z, z where its gradient will want it)."""
    return activate(activation, z), None if activation == "identity" else z
