"""`expert_linear`: the product of each expert's tokens with its own weight and update, as one operation.

    y[rows of e] = x[rows of e] (W_e + scale * drop(psi(b_e h_e^T)))^T + bias_e       x [S, in] -> y [S, out]

Rows are sorted by expert. Each expert that has rows is one `linear` of the backend, so both forms, small updates in
16 bits and frozen weights stored in either order are its matter; an expert without rows costs nothing. Rows after the
last expert's, as expert parallelism has them, give zeros. Nothing of a weight's size is made, but for what the backend
makes for one expert, and nothing of that size is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..config import is_factored
from ..operation import Operation
from ..ops import compute, read_in_backward
from ..update import Action, Factors


@torch.library.custom_op("genft::expert_linear", mutates_args=())
def expert_linear(
    x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor | None, b: Tensor | None,
    seed: Tensor | None, scale: float, activation: str, dropout: float, stream: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [S, out], scale * x h [S, k] in the factored form; else empty).

    `x` [S, in]; expert e has rows `offsets[e]` to `offsets[e + 1]`, int64 [E + 1]; `weight` [E, out, in] of any strides
    and perhaps another dtype than `x` (autocast); `bias` [E, out], frozen; `h` [E, in, k] and `b` [E, out, k], or None
    for weights without an update; `seed` int64 [E].
    """
    return _run("expert_linear", x, offsets, weight, bias, h, b, seed, scale, activation, dropout, stream, backend)


@expert_linear.register_fake
def _(
    x: Tensor, offsets: Tensor, weight: Tensor, bias: Any, h: Any, b: Any, seed: Any, scale: float, activation: str,
    dropout: float, stream: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, kept = x.shape[0], h is not None and is_factored(activation, dropout)
    return x.new_empty((rows, weight.shape[1])), x.new_empty((rows, h.shape[2]) if kept else 0)


@torch.library.custom_op("genft::expert_linear_backward", mutates_args=())
def expert_linear_backward(
    grad: Tensor, x: Tensor | None, offsets: Tensor, weight: Tensor | None, h: Tensor | None, b: Tensor | None,
    xh: Tensor | None, seed: Tensor | None, scale: float, activation: str, dropout: float, stream: int,
    needs: list[bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of (x, h, b), those that `needs` names; of experts without rows they are zero."""
    settings = scale, activation, dropout, stream
    return _run("expert_linear_backward", grad, x, offsets, weight, h, b, xh, seed, *settings, needs, backend)


@expert_linear_backward.register_fake
def _(
    grad: Tensor, x: Any, offsets: Tensor, weight: Any, h: Any, b: Any, xh: Any, seed: Any, scale: float,
    activation: str, dropout: float, stream: int, needs: list[bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    need_x, need_h, need_b = needs
    experts, left = offsets.shape[0] - 1, xh if is_factored(activation, dropout) else h
    return (
        grad.new_empty((grad.shape[0], weight.shape[2]) if need_x else 0),
        grad.new_empty((experts, x.shape[1], b.shape[2]) if need_h else 0),
        grad.new_empty((experts, grad.shape[1], left.shape[-1]) if need_b else 0),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, offsets, weight, _, h, b, seed, ctx.scale, ctx.activation, ctx.dropout, ctx.stream, ctx.backend = inputs
    need_x, need_h, need_b = (ctx.needs_input_grad[i] for i in (0, 4, 5))
    ctx.needs = [need_x, need_h, need_b]
    tensors = x, weight, h, b, output[1], seed
    factored = is_factored(ctx.activation, ctx.dropout)
    x, *others = read_in_backward(tensors, (need_x, need_h, need_b), factored)
    ctx.save_for_backward(x, offsets, *others)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor, backward: Callable) -> tuple[Tensor | None, ...]:
    settings = ctx.scale, ctx.activation, ctx.dropout, ctx.stream, ctx.needs, ctx.backend
    grads = backward(grad, *ctx.saved_tensors, *settings)
    dx, dh, db = (g if need else None for g, need in zip(grads, ctx.needs, strict=True))
    return dx, None, None, None, dh, db, None, None, None, None, None, None


def _expert_linear(
    x: Tensor, offsets: Tensor, weight: Tensor, bias: Any, h: Any, b: Any,
    seed: Any, scale: float, activation: str, dropout: float, stream: int, backend: str,
) -> tuple[Tensor, Any]:  # fmt: skip
    y = x.new_empty((x.shape[0], weight.shape[1]))
    kept = h is not None and is_factored(activation, dropout)
    results = [y, x.new_empty((x.shape[0], h.shape[2]))] if kept else [y]
    for expert, rows in _with_rows(offsets):
        own_bias = None if bias is None else bias[expert].to(x.dtype)
        if h is None:
            y[rows] = torch.nn.functional.linear(x[rows], weight[expert].to(x.dtype), own_bias)
            continue
        own = x[rows], weight[expert], own_bias, h[expert], b[expert], _of(seed, expert)
        found = compute(backend, "linear", *own, scale, activation, dropout, stream)
        for result, part in zip(results, found, strict=False):
            result[rows] = part
    for result in results:
        result[_last(offsets) :] = 0
    return y, results[1] if kept else None


def _expert_linear_backward(
    grad: Tensor, x: Any, offsets: Tensor, weight: Any, h: Any, b: Any,
    xh: Any, seed: Any, scale: float, activation: str, dropout: float, stream: int,
    needs: list[bool], backend: str,
) -> tuple[Any, Any, Any]:  # fmt: skip
    need_x, need_h, need_b = needs
    experts = offsets.shape[0] - 1
    dx: Any = grad.new_empty((grad.shape[0], weight.shape[2])) if need_x else None
    dh = grad.new_zeros((experts, x.shape[1], b.shape[2])) if need_h else None
    db = grad.new_zeros((experts, grad.shape[1], (h if xh is None else xh).shape[-1])) if need_b else None
    for expert, rows in _with_rows(offsets):
        dy = grad[rows]
        tensors = _of(x, rows), _of(weight, expert), _of(h, expert), _of(b, expert), _of(xh, rows), _of(seed, expert)
        if h is None and b is None and xh is None:  # weights without an update
            parts = dy @ weight[expert].to(dy.dtype), None, None
        else:
            wanted = [need_x, False, need_h, need_b]
            own_dx, _, *of_factors = compute(
                backend, "linear_backward", dy, *tensors, scale, activation, dropout, stream, wanted
            )
            parts = own_dx, *of_factors
        for total, index, part in zip((dx, dh, db), (rows, expert, expert), parts, strict=True):
            if total is not None and part is not None:
                total[index] = part
    if dx is not None:
        dx[_last(offsets) :] = 0
    return dx, dh, db


def _with_rows(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and which."""
    bounds = offsets.tolist()
    for expert, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end > start:
            yield expert, slice(start, end)


def _last(offsets: Tensor) -> int:
    return int(offsets[-1])


def _of(tensor: Tensor | None, index: int | slice) -> Tensor | None:
    """Its part, None of None; of seeds [1], as one layer has it."""
    if tensor is None:
        return None
    return tensor[index : index + 1] if tensor.dim() == 1 and isinstance(index, int) else tensor[index]


_OPERATIONS: dict[str, Callable] = {"expert_linear": _expert_linear, "expert_linear_backward": _expert_linear_backward}


def _compute(backend: str, operation: str, *args: Any) -> tuple[Tensor | None, ...]:
    return _OPERATIONS[operation](*args, backend)


def _run(operation: str, *args: Any) -> Any:
    """The results with an empty tensor for each None."""
    return tuple(args[0].new_empty(0) if result is None else result for result in _OPERATIONS[operation](*args))


expert_linear_node = Operation("expert_linear", expert_linear, expert_linear_backward, _setup, _gradients, _compute)
SIDE_BY_SIDE = Action(1.0, "identity")  # of factors that have their scales within


def expert_product(
    x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors | None = None,
    action: Action = SIDE_BY_SIDE, backend: str = "eager",
) -> Tensor:  # fmt: skip
    """y [S, out] in x's dtype or autocast's, by `expert_linear`; without factors of the weights alone."""
    (h, b, stream), (scale, psi, dropout, seed) = factors or (None, None, 0), action
    dtype = compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    return expert_linear_node(
        x.to(dtype), offsets, weight, bias, h, b, seed, float(scale), psi, dropout, stream, backend
    )
