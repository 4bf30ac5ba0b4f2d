"""FLOPs of the operations, which a FLOP counter sees as one each: their matrix products, as planned
(docs/method.md#what-it-costs), two for each multiplication and addition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import _torch_private, ops  # noqa: F401  (defines the operations)
from .config import is_factored
from .experts import products  # noqa: F401

_genft = torch.ops.genft
Shape = Sequence[int]


def tell_counters() -> None:
    """Have the counters at work know the formulas: one that was made before this module was imported does not."""
    for formulas in _torch_private.flop_formulas_in_use():
        formulas.update({op: formula for op, formula in flop_registry.items() if op not in formulas})


@register_flop_formula([_genft.column, _genft.column_backward])
def _column(first: Any, second: Any, *args: Any, **kwargs: Any) -> int:
    """Of (weights, down), or of (grad, weights): W times a thin matrix for each layer."""
    weights, thin = (first, second) if isinstance(first[0], (list, tuple, torch.Size)) else (second, first)
    k = thin[1] if thin is second else thin[2]
    return sum(2 * math.prod(weight) * k for weight in weights)


@register_flop_formula(_genft.row)
def _row(
    left: Shape, right: Shape, down: Shape, bias: Any, seed: Any, outer: str, dropout: float, *args: Any, **kwargs: Any
) -> int:
    (layers, out_features, k1), (_, in_features, _), (_, k, _) = left, right, down
    if is_factored(outer, dropout):  # by a core k x k1
        return 2 * layers * k * k1 * (out_features + in_features)
    return 2 * layers * out_features * in_features * (k1 + k)


@register_flop_formula(_genft.row_backward)
def _row_backward(
    grad: Any, left: Shape, right: Shape, down: Shape, pre: Any, seed: Any, outer: str, dropout: float, *args: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    (layers, out_features, k1), (_, in_features, _), (_, k, _) = left, right, down
    if is_factored(outer, dropout):
        return 4 * layers * k * k1 * (out_features + in_features)
    return 2 * layers * out_features * in_features * (3 * k1 + 2 * k)


@register_flop_formula(_genft.linear)
def _linear(
    x: Shape, weight: Shape, bias: Any, h: Any, b: Shape, seed: Any, scale: float, activation: str, dropout: float,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    tokens, big = math.prod(x[:-1]), math.prod(weight)
    small = tokens * sum(weight) if is_factored(activation, dropout) else big
    return 2 * tokens * big + 2 * small * b[1]


@register_flop_formula(_genft.linear_backward)
def _linear_backward(
    grad: Shape, x: Any, weight: Any, h: Any, b: Any, xh: Any, seed: Any, scale: float, activation: str,
    dropout: float, stream: int, needs: Sequence[bool], *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    need_x, _, need_h, need_b = needs
    tokens, out_features = math.prod(grad[:-1]), grad[-1]
    in_features = next(shape[-1] if shape is not h else shape[0] for shape in (weight, x, h) if shape is not None)
    k = next(shape[1] for shape in (b, h, xh) if shape is not None)
    big, factors = in_features * out_features, need_h + need_b
    if is_factored(activation, dropout):
        thin = tokens * k * ((need_x or need_h) * out_features + need_x * in_features)
        return 2 * (need_x * tokens * big + thin + tokens * k * (need_h * in_features + need_b * out_features))
    # The tile of the update, of dy^T x, and its two contractions.
    return 2 * big * (need_x * tokens + bool(factors) * tokens + k * (1 + factors))


@register_flop_formula(_genft.expert_linear)
def _expert_linear(
    x: Any, offsets: Any, weight: Any, bias: Any, h: Any, b: Any, seed: Any, scale: float, activation: str,
    dropout: float, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Of all rows, as if they were one expert's; tiled updates as if every expert had rows."""
    (rows, _), (experts, *matrix) = x, weight
    big, k = math.prod(matrix), 0 if b is None else b[2]
    small = rows * sum(matrix) if is_factored(activation, dropout) else experts * big
    return 2 * rows * big + 2 * small * k


@register_flop_formula(_genft.expert_linear_backward)
def _expert_linear_backward(
    grad: Any, x: Any, offsets: Any, weight: Any, h: Any, b: Any, xh: Any, seed: Any, scale: float, activation: str,
    dropout: float, stream: int, needs: list[bool], *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    need_x, need_h, need_b = needs
    if h is None and b is None and xh is None:  # without an update
        return 2 * grad[0] * math.prod(weight[1:])
    one: list[Any] = [None if each is None else each[1:] for each in (weight, h, b)]
    settings = scale, activation, dropout, stream, [need_x, False, need_h, need_b]
    flops: int = _linear_backward(grad, x, *one, xh, seed, *settings)
    if is_factored(activation, dropout):
        return flops
    _, (in_features, k), (out_features, _) = one
    return flops + 2 * (offsets[0] - 2) * in_features * out_features * k * (1 + need_h + need_b)
