"""The operations as `torch.library` custom ops with fakes and gradients: one schema for every backend.

    column:  h = phi(W A^T + a)                               W [out, in], A [k, in]          -> h [out, k]
    row:     h = phi(drop(psi(left right^T))^T A^T + a)       left [out, k1], right [in, k1], A [k, out] -> h [in, k]
    linear:  y = x (W + scale * drop(psi(b h^T)))^T + bias    x [..., in], h [in, k], b [out, k]  -> y [..., out]

(docs/method.md#two-products). `column` and `row` do L layers of one shape at once: W is a list, every other matrix has
a leading dimension L, the bias is shared. `linear` is one layer's. A gradient that nobody asked for is not computed: a
backend returns None for it, an op an empty tensor, because an op must return tensors.

The package calls `column_node`, `row_node` and `linear_node`, which give the first result alone
(genft_kernels/operation.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends.choices import first_tensor
from .backends.compiled.run import BuildError
from .backends.eager import operations as eager
from .backends.eager.products import lie_in_columns
from .config import is_factored
from .frozen_weight import FrozenWeight, opened
from .operation import Operation, keep, kept


def compute(backend: str, operation: str, *args: Any) -> tuple[Any, ...]:
    """An operation's results from a backend, or from the one that is chosen here (`backends.resolved`)."""
    if not backends.is_open(backend):
        return _compute_by(backend, operation, args)
    first = first_tensor(args)
    for _ in backends.KERNEL_BACKENDS:  # each of which may fail
        if (name := backends.resolved(backend, first.device, first.dtype, operation, args)) == "eager":
            break
        try:
            return _compute_by(name, operation, args)
        except (backends.LaunchError, BuildError) as error:
            if isinstance(error, backends.LaunchError) and backends.lacks_memory(error):
                raise
            backends.set_aside(name, first.device, operation, error)
    return _compute_by("eager", operation, args)


def _compute_by(backend: str, operation: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # By its name, not looked up: a compiler looks into it.
    device, module = first_tensor(args).device, eager if backend == "eager" else backends.load(backend)
    function = getattr(module, operation)
    if torch.is_autocast_enabled(device.type):
        # The dtypes are settled by now; autocast must not settle them anew inside a product.
        with torch.autocast(device.type, enabled=False):
            return _compute_by(backend, operation, args)
    handles = {FrozenWeight} if backend == "eager" else {FrozenWeight, list}
    if not handles.isdisjoint(map(type, args)):  # else a layer has two dozen calls fewer
        # Plain PyTorch makes the W of a list dense itself, one after the other.
        args = tuple(opened(each) if type(each) in handles else each for each in args)
    if device.type != "cuda" or backend == "eager":
        return function(*args)
    with torch.cuda.device(device):  # Triton launches on the current one, whatever its tensors are on
        return function(*args)


def _run(backend: str, operation: str, *args: Any) -> Any:
    """The same with an empty tensor for each None."""
    empty = first_tensor(args).new_empty
    return tuple(empty(0) if result is None else result for result in compute(backend, operation, *args))


# --- column ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("genft::column", mutates_args=())
def column(
    weights: list[Tensor], down: Tensor, bias: Tensor | None, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    """(h [L, out, k], what the activation was applied to [L, out, k]; empty if the activation is the identity).

    `weights` are L matrices [out, in] of any strides, `down` is [L, k, in], `bias` [k]. The weights may have another
    dtype than `down` (autocast): they are cast here and again in backward, so that no copy of them is kept.
    """
    return _run(backend, "column", weights, down, bias, activation)


@column.register_fake
def _(weights: list[Tensor], down: Tensor, bias: Any, activation: str, backend: str) -> tuple[Tensor, ...]:
    shape = down.shape[0], down.shape[1], weights[0].shape[0]
    columns = backend not in backends.KERNEL_BACKENDS and lie_in_columns(weights)
    h = down.new_empty(shape).mT if columns else down.new_empty((shape[0], shape[2], shape[1]))
    return h, torch.empty_like(h) if activation != "identity" else h.new_empty(0)


@torch.library.custom_op("genft::column_backward", mutates_args=())
def column_backward(
    grad: Tensor, weights: list[Tensor], pre: Tensor, activation: str, needs: list[bool], backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of (down [L, k, in], bias [k]), those that `needs` names."""
    return _run(backend, "column_backward", grad, weights, pre, activation, needs)


@column_backward.register_fake
def _(grad: Tensor, weights: Any, pre: Tensor, activation: str, needs: Any, backend: str) -> tuple[Tensor, ...]:
    layers, _, k = grad.shape
    shapes = ((layers, k, weights[0].shape[1]), (k,))
    return tuple(grad.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


def _column_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Any]) -> None:
    weights, _, _, ctx.activation, ctx.backend = inputs
    keep(ctx, *weights, output[1])
    ctx.set_materialize_grads(False)


def _column_gradients(ctx: Any, grad: Tensor, backward: Callable[..., Any]) -> tuple[Any, ...]:
    *weights, pre = kept(ctx)
    needs = list(ctx.needs_input_grad[1:3])
    grads = backward(grad, weights, pre, ctx.activation, needs, ctx.backend)
    return None, *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


def _column_by_pytorch(*args: Any) -> bool:
    return backends.by_pytorch(args[-1], first_tensor(args).device)


column_node = Operation(
    "column", column, column_backward, _column_setup, _column_gradients, compute, _column_by_pytorch
)


# --- row ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("genft::row", mutates_args=())
def row(
    left: Tensor, right: Tensor, down: Tensor, bias: Tensor | None, seed: Tensor | None, outer: str, dropout: float,
    inner: str, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(h [L, in, k], what the inner activation was applied to [L, in, k]; empty if that is the identity).

    `left` [L, out, k1], `right` [L, in, k1], `down` [L, k, out], `bias` [k]; layer l draws its mask from `seed[l]`.
    """
    return _run(backend, "row", left, right, down, bias, seed, outer, dropout, inner)


@row.register_fake
def _(left: Any, right: Tensor, down: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, inner, _ = rest
    h = down.new_empty((*right.shape[:2], down.shape[1]))
    return h, torch.empty_like(h) if inner != "identity" else h.new_empty(0)


@torch.library.custom_op("genft::row_backward", mutates_args=())
def row_backward(
    grad: Tensor, left: Tensor, right: Tensor, down: Tensor, pre: Tensor, seed: Tensor | None, outer: str,
    dropout: float, inner: str, needs: list[bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of (left, right, down, bias [k]), those that `needs` names."""
    return _run(backend, "row_backward", grad, left, right, down, pre, seed, outer, dropout, inner, needs)


@row_backward.register_fake
def _(grad: Tensor, left: Tensor, right: Tensor, down: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, needs, _ = rest
    shapes = (left.shape, right.shape, down.shape, down.shape[1:2])
    return tuple(grad.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


def _row_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Any]) -> None:
    left, right, down, _, seed, ctx.outer, ctx.dropout, ctx.inner, ctx.backend = inputs
    ctx.save_for_backward(left, right, down, output[1], seed)
    ctx.set_materialize_grads(False)


def _row_gradients(ctx: Any, grad: Tensor, backward: Callable[..., Any]) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:4])
    grads = backward(grad, *ctx.saved_tensors, ctx.outer, ctx.dropout, ctx.inner, needs, ctx.backend)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None, None


def _factored(*args: Any) -> bool:
    return is_factored(*args[-4:-2])  # (activation, dropout), whatever the backend


row_node = Operation("row", row, row_backward, _row_setup, _row_gradients, compute, _factored)


# --- linear ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("genft::linear", mutates_args=())
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, seed: Tensor | None, scale: float,
    activation: str, dropout: float, stream: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [..., out], scale * x h [tokens, k] in the factored form; empty in the tiled form).

    `weight` may have another dtype than `x` (autocast): it is cast here and again in backward, so that no copy of
    it is kept.
    """
    return _run(backend, "linear", x, weight, bias, h, b, seed, scale, activation, dropout, stream)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, h: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, activation, dropout, _, _ = rest
    factored = is_factored(activation, dropout)
    tokens = math.prod(x.shape[:-1])  # not numel(), which makes a symbolic size a constant: a graph for each length
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, x.new_empty((tokens, h.shape[1]) if factored else 0)


@torch.library.custom_op("genft::linear_backward", mutates_args=())
def linear_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor | None, h: Tensor | None, b: Tensor | None, xh: Tensor | None,
    seed: Tensor | None, scale: float, activation: str, dropout: float, stream: int, needs: list[bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of (x, bias, h, b), those that `needs` names.

    What they do not take may be None: dx takes (weight, h, b), dbias nothing, and in the factored form dh takes
    (x, b) and db (xh); in the tiled form dh and db each take (x, h, b).
    """
    settings = seed, scale, activation, dropout, stream
    return _run(backend, "linear_backward", grad, x, weight, h, b, xh, *settings, needs)


@linear_backward.register_fake
def _(grad: Tensor, x: Any, weight: Any, h: Any, b: Any, xh: Any, *rest: Any) -> tuple[Tensor, ...]:
    *_, activation, dropout, _, (need_x, need_bias, need_h, need_b), _ = rest
    out_features, factored = grad.shape[-1], is_factored(activation, dropout)

    def thin(n: int, k: int) -> Tensor:  # as `sum_over_tokens` has it
        return grad.new_empty((k, n)).t() if factored and grad.device.type == "cpu" else grad.new_empty((n, k))

    return (
        grad.new_empty((*grad.shape[:-1], weight.shape[1]) if need_x else 0),
        grad.new_empty(out_features if need_bias else 0),
        thin(x.shape[-1], b.shape[1]) if need_h else grad.new_empty(0),
        thin(out_features, (xh if factored else h).shape[1]) if need_b else grad.new_empty(0),
    )


def _linear_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Any]) -> None:
    x, weight, _, h, b, seed, ctx.scale, ctx.activation, ctx.dropout, ctx.stream, ctx.backend = inputs
    need_x, _, need_bias, need_h, need_b = ctx.needs_input_grad[:5]
    ctx.needs = [need_x, need_bias, need_h, need_b]
    tensors = x, weight, h, b, output[1], seed
    keep(ctx, *read_in_backward(tensors, (need_x, need_h, need_b), is_factored(ctx.activation, ctx.dropout)))
    ctx.set_materialize_grads(False)


def read_in_backward(tensors: tuple[Any, ...], needs: tuple[bool, bool, bool], factored: bool) -> tuple[Any, ...]:
    """Of a linear node's (x, W, h, b, x h, seed) what the gradients of (x, h, b) that it `needs` take, else None."""
    (x, weight, h, b, xh, seed), (need_x, need_h, need_b) = tensors, needs
    tiled_factors = not factored and (need_h or need_b)
    return (
        x if need_h or tiled_factors else None,
        weight if need_x else None,
        h if need_x or tiled_factors else None,
        b if need_x or need_h or tiled_factors else None,
        xh if need_b and factored else None,
        seed if need_x or tiled_factors else None,
    )


def _linear_gradients(ctx: Any, grad: Tensor, backward: Callable[..., Any]) -> tuple[Any, ...]:
    settings = ctx.scale, ctx.activation, ctx.dropout, ctx.stream, ctx.needs, ctx.backend
    grads = backward(grad, *kept(ctx), *settings)
    dx, dbias, dh, db = (g if need else None for g, need in zip(grads, ctx.needs, strict=True))
    return dx, None, dbias, dh, db, None, None, None, None, None, None


linear_node = Operation("linear", linear, linear_backward, _linear_setup, _linear_gradients, compute, _factored)
