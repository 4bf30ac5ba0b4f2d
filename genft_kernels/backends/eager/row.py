"""The row stage: h = phi(Y^T A^T + a) of the column stage's update Y (docs/method.md#two-products)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...activations import activation_backward
from ...config import is_factored
from ...philox import COLUMN_STREAM
from .products import long_sums, sum_of_rows
from .sweep import sweep
from .thin import activated
from .update_tile import Others, Update, Wanted


def row(
    left: Tensor,
    right: Tensor,
    down: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    outer: str,
    dropout: float,
    inner: str,
) -> tuple[Tensor, Tensor | None]:
    """h = phi(Y^T A^T + a)  [L, in, k], Y = drop(psi(left right^T))  [out, in], for L layers."""
    if is_factored(outer, dropout):
        z = right.bmm(long_sums(down, left).mT)  # the stages meet in a core [k, k1]
    else:
        updates = _updates(left, right, outer, dropout, seed)
        z = torch.stack([_tiled(update, a) for update, a in zip(updates, down, strict=True)])
    z = z if bias is None else z + bias
    return activated(z.to(down.dtype), inner)


def row_backward(
    grad: Tensor,
    left: Tensor,
    right: Tensor,
    down: Tensor,
    pre: Tensor | None,
    seed: Tensor | None,
    outer: str,
    dropout: float,
    inner: str,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """(dleft [L, out, k1], dright [L, in, k1], dA [L, k, out], da [k])."""
    *need_matrices, need_bias = needs
    dz = activation_backward(inner, grad, pre)  # [L, in, k]
    dbias = sum_of_rows(dz.flatten(0, 1)) if need_bias else None
    if is_factored(outer, dropout):
        return *_factored_backward(dz, left, right, down, *need_matrices), dbias
    layers = zip(_updates(left, right, outer, dropout, seed), down, dz, strict=True)
    grads = zip(*(_tiled_backward(*layer, need_matrices) for layer in layers), strict=True)
    return *(None if parts[0] is None else torch.stack(parts) for parts in grads), dbias


def _factored_backward(
    dz: Tensor, left: Tensor, right: Tensor, down: Tensor, need_left: bool, need_right: bool, need_down: bool
) -> tuple[Tensor | None, ...]:
    core_grad = long_sums(dz.mT, right) if need_left or need_down else None  # [L, k, k1]
    return (
        down.mT.bmm(core_grad) if core_grad is not None and need_left else None,
        dz.bmm(long_sums(down, left)) if need_right else None,
        core_grad.bmm(left.mT) if core_grad is not None and need_down else None,
    )


def _updates(left: Tensor, right: Tensor, outer: str, dropout: float, seed: Tensor | None) -> list[Update]:
    """Y of each layer, by its own seed."""
    seeds = [None] * left.shape[0] if seed is None else seed.split(1)
    return [
        Update(b, h, outer, dropout, own_seed, COLUMN_STREAM) for b, h, own_seed in zip(left, right, seeds, strict=True)
    ]


def _tiled(y: Update, down: Tensor) -> Tensor:
    """Y^T A^T  [in, k] of one layer, in sums that are at least float32 if Y takes more than one tile."""
    z = sweep(y, Others(left=down.t()), Wanted(others_right=True)).others_right
    assert z is not None
    return z


def _tiled_backward(y: Update, down: Tensor, dz: Tensor, needs: list[bool]) -> tuple[Tensor | None, ...]:
    """One layer, as in flash attention: a tile of Y is made again, and dY = (dZ A)^T is formed for it and used up."""
    need_left, need_right, need_down = needs
    dtype = down.dtype
    sums = sweep(y, Others(down.t(), dz), Wanted(need_left, need_right, others_left=need_down))
    ddown = None if sums.others_left is None else sums.others_left.t()
    return tuple(None if grad is None else grad.to(dtype) for grad in (sums.left, sums.right, ddown))
