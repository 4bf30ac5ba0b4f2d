"""A sweep over an update U = drop(psi(left right^T)): its tiles one by one, and all that is made of them on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import philox
from ...activations import activate_, activation_backward_
from . import cpu_pass
from .fold import Folding, fold_rows
from .products import add_part, product
from .update_tile import Others, Sums, Update, Wanted

NO_OTHERS, NOTHING = Others(), Wanted()


def sweep(update: Update, others: Others = NO_OTHERS, wanted: Wanted = NOTHING, folding: Folding | None = None) -> Sums:
    """The wanted parts of an update, whose rows go to `folding`; by compiled code where there is any."""
    return cpu_pass.sweep(update, others, wanted, folding) or _plain(update, others, wanted, folding)


def _plain(update: Update, others: Others, wanted: Wanted, folding: Folding | None) -> Sums:
    left: list[Tensor] = []
    others_left: list[Tensor] = []
    right = others_right = None
    for rows in update.tiles():
        pre = product("pre", update.left[rows], update.right.t())
        grad = others.product("grad", rows) if wanted.gradient else None
        value = elementwise_(update, rows, pre, grad, folding)
        if wanted.left and grad is not None:
            left.append(grad @ update.right)
        if wanted.right and grad is not None:
            right = add_part(right, grad.t() @ update.left[rows])
        if wanted.others_left and others.right is not None:
            others_left.append(value @ others.right)
        if wanted.others_right and others.left is not None:
            others_right = add_part(others_right, value.t() @ others.left[rows])
    return Sums(torch.cat(left) if left else None, right, torch.cat(others_left) if others_left else None, others_right)


def elementwise_(update: Update, rows: slice, pre: Tensor, grad: Tensor | None, folding: Folding | None) -> Tensor:
    """U in the place of `pre`, left right^T of some rows, whose gradient takes the place of U's."""
    keep = _keep_factors(update, rows, pre.dtype)
    if grad is not None:
        activation_backward_(update.activation, grad if keep is None else grad.mul_(keep), pre)
    value = activate_(update.activation, pre)
    value = value if keep is None else value.mul_(keep)
    if folding is not None:
        fold_rows(folding, rows, value, update.seed)
    return value


def _keep_factors(update: Update, rows: slice, dtype: torch.dtype) -> Tensor | None:
    """0 or 1 / (1 - p) for each element; None without dropout."""
    if update.dropout == 0:
        return None
    assert update.seed is not None
    size = update.right.shape[0], update.left.shape[0]
    keep = philox.keep_mask(update.seed, update.stream, *size, update.dropout, rows)
    return keep.to(dtype).mul_(torch.tensor(1 / (1 - update.dropout), dtype=dtype, device="cpu"))
