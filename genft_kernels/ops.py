"""The operations as `torch.library` custom ops with fakes and gradients: one schema for every backend.

    column:  h = phi(W A^T + a)                               W [out, in], A [k, in]          -> h [out, k]
    row:     h = phi(drop(psi(left right^T))^T A^T + a)       left [out, k1], right [in, k1], A [k, out] -> h [in, k]
    linear:  y = x (W + scale * drop(psi(b h^T)))^T + bias    x [..., in], h [in, k], b [out, k]  -> y [..., out]

(docs/method.md#two-products). `column` and `row` do L layers of one shape at once: W is a list, every other matrix has
a leading dimension L, the bias is shared. `linear` is one layer's. A gradient that nobody asked for is not computed: a
backend returns None for it, an op an empty tensor, because an op must return tensors.

The package calls `column_node`, `row_node` and `linear_node`, which give the first result alone, by a plain node of the
autograd graph: it takes a fraction of a custom op's time to make, and calls the backend itself. Where something listens
to the dispatcher (compilation, tracing, a dispatch mode), they are the custom ops.

In W's place the nodes take a handle of one that is stored quantised (`FrozenWeight`): it is made dense for the
operation and again for its backward, and the node keeps the handle.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _torch_private, backends
from .backends.compiled.run import BuildError
from .config import is_factored
from .frozen_weight import FrozenWeight, opened


def compute(backend: str, operation: str, *args: Any) -> tuple[Any, ...]:
    """An operation's results from a backend, or from the one that is chosen here (`backends.choose`)."""
    if not backends.is_open(backend):
        return _compute_by(backend, operation, *args)
    first = _first(args)
    while (name := backends.chosen(backend, first.device, first.dtype, operation, args)) != "eager":
        try:
            return _compute_by(name, operation, *args)
        except (backends.LaunchError, BuildError) as error:
            backends.set_aside(name, first.device, operation, error)
    return _compute_by(name, operation, *args)


def _compute_by(backend: str, operation: str, *args: Any) -> tuple[Any, ...]:
    device, function = _first(args).device, getattr(backends.load(backend), operation)
    if torch.is_autocast_enabled(device.type):
        # The dtypes are settled by now; autocast must not settle them anew inside a product.
        with torch.autocast(device.type, enabled=False):
            return _compute_by(backend, operation, *args)
    # Plain PyTorch makes the W of a list dense itself, one after the other.
    args = tuple(each if backend == "eager" and isinstance(each, list) else opened(each) for each in args)
    if device.type != "cuda":
        return function(*args)
    with torch.cuda.device(device):  # Triton launches on the current one, whatever its tensors are on
        return function(*args)


def _run(backend: str, operation: str, *args: Any) -> tuple[Tensor, ...]:
    """The same with an empty tensor for each None."""
    empty = _first(args).new_empty
    return tuple(empty(0) if result is None else result for result in compute(backend, operation, *args))


def _first(args) -> Tensor:
    return args[0] if isinstance(args[0], Tensor) else args[1]


def first_order(backward: Callable) -> Callable:
    """For a node's backward that is not differentiable: RuntimeError under `create_graph=True`.

    PyTorch's `once_differentiable` raises later, and not where the caller takes an unused input for a zero, as
    `torch.autograd.functional.hvp` does.
    """

    @functools.wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError('no second derivatives (create_graph=True): backend="reference" has them')
        return backward(ctx, *grads)

    return checked


def differentiable(
    op: Callable, backward_op: Callable, setup: Callable, gradients: Callable, compute: Callable = compute
) -> Callable[..., Tensor]:
    """Give `op` its gradient by `backward_op`, and make what takes its arguments and returns its first result.

    Args:
        setup: saves in a context what `gradients` will need, given the op's inputs and outputs.
        gradients: (context, gradient of the first result, `backward_op`) -> the gradient of each input.
        compute: (backend, `<op>` or `<op>_backward`, its other arguments) -> its results, None where one is not wanted.
    """
    name, inputs = _torch_private.name_of_op(op).removeprefix("genft::"), _torch_private.arguments_of_op(op)

    def of_op(ctx, grad, _):
        grads = (None,) * inputs if grad is None else gradients(ctx, grad, backward_op)
        # An op wants a list for a list.
        lists = ([None] * len(need) if isinstance(need, (list, tuple)) else None for need in ctx.needs_input_grad)
        return tuple(each if grad is None else grad for each, grad in zip(lists, grads, strict=True))

    op.register_autograd(of_op, setup_context=setup)

    def run(*args):
        if _torch_private.dispatch_modes_active():  # within a node that keeps a handle: let them see the op
            _tell_flop_counters()
            return op(*map(opened, args))
        return compute(args[-1], name, *args[:-1])

    def run_backward(*args):
        if _torch_private.dispatch_modes_active():
            return backward_op(*map(opened, args))
        return compute(args[-1], f"{name}_backward", *args[:-1])

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            results = run(*args)
            setup(ctx, args, results)
            # `data`, because a view that is made within a node may not be changed in place, as ReLU(inplace=True) does.
            return results[0].data

        @staticmethod
        @first_order
        def backward(ctx, grad):
            return (None,) * inputs if grad is None else gradients(ctx, grad, run_backward)

    def node(*args) -> Tensor:
        if torch.compiler.is_compiling():
            return op(*map(opened, args))[0]
        if _torch_private.dispatch_modes_active() and not any(map(_is_handle, args)):
            _tell_flop_counters()
            return op(*args)[0]
        return Node.apply(*args) if torch.is_grad_enabled() else run(*args)[0]

    return node


def _is_handle(value: object) -> bool:
    return isinstance(value[0] if isinstance(value, list) else value, FrozenWeight)


def keep(ctx: Any, *values: Tensor | FrozenWeight | None) -> None:
    """Save tensors for backward, and the handles among them beside: what they stand for is not kept."""
    ctx.handles = {place: value for place, value in enumerate(values) if isinstance(value, FrozenWeight)}
    ctx.save_for_backward(*(None if place in ctx.handles else value for place, value in enumerate(values)))


def kept(ctx: Any) -> list:
    """What was kept."""
    return [ctx.handles.get(place, tensor) for place, tensor in enumerate(ctx.saved_tensors)]


def _tell_flop_counters() -> None:
    """Have a FLOP counter know the operations. Who uses one has imported its module, which brings Triton with it."""
    if "torch.utils.flop_counter" in sys.modules:
        from . import flops  # noqa: F401


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
def _(weights, down, bias, activation, backend):
    h = down.new_empty((down.shape[0], weights[0].shape[0], down.shape[1]))
    return h, torch.empty_like(h) if activation != "identity" else h.new_empty(0)


@torch.library.custom_op("genft::column_backward", mutates_args=())
def column_backward(
    grad: Tensor, weights: list[Tensor], pre: Tensor, activation: str, needs: list[bool], backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of (down [L, k, in], bias [k]), those that `needs` names."""
    return _run(backend, "column_backward", grad, weights, pre, activation, needs)


@column_backward.register_fake
def _(grad, weights, pre, activation, needs, backend):
    layers, _, k = grad.shape
    shapes = ((layers, k, weights[0].shape[1]), (k,))
    return tuple(grad.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


def _column_setup(ctx, inputs, output):
    weights, _, _, ctx.activation, ctx.backend = inputs
    keep(ctx, *weights, output[1])
    ctx.set_materialize_grads(False)


def _column_gradients(ctx, grad, backward):
    *weights, pre = kept(ctx)
    needs = list(ctx.needs_input_grad[1:3])
    grads = backward(grad, weights, pre, ctx.activation, needs, ctx.backend)
    return None, *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


column_node = differentiable(column, lambda *args: column_backward(*args), _column_setup, _column_gradients)


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
def _(left, right, down, bias, seed, outer, dropout, inner, backend):
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
def _(grad, left, right, down, pre, seed, outer, dropout, inner, needs, backend):
    shapes = (left.shape, right.shape, down.shape, down.shape[1:2])
    return tuple(grad.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


def _row_setup(ctx, inputs, output):
    left, right, down, _, seed, ctx.outer, ctx.dropout, ctx.inner, ctx.backend = inputs
    ctx.save_for_backward(left, right, down, output[1], seed)
    ctx.set_materialize_grads(False)


def _row_gradients(ctx, grad, backward):
    needs = list(ctx.needs_input_grad[:4])
    grads = backward(grad, *ctx.saved_tensors, ctx.outer, ctx.dropout, ctx.inner, needs, ctx.backend)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None, None


row_node = differentiable(row, lambda *args: row_backward(*args), _row_setup, _row_gradients)


# --- linear ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("genft::linear", mutates_args=())
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, seed: Tensor | None, scale: float,
    activation: str, dropout: float, stream: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [..., out], x h [tokens, k] in the factored form; empty in the tiled form).

    `weight` may have another dtype than `x` (autocast): it is cast here and again in backward, so that no copy of
    it is kept.
    """
    return _run(backend, "linear", x, weight, bias, h, b, seed, scale, activation, dropout, stream)


@linear.register_fake
def _(x, weight, bias, h, b, seed, scale, activation, dropout, stream, backend):
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
def _(grad, x, weight, h, b, xh, seed, scale, activation, dropout, stream, needs, backend):
    need_x, need_bias, need_h, need_b = needs
    out_features, left = grad.shape[-1], xh if is_factored(activation, dropout) else h
    return (
        grad.new_empty((*grad.shape[:-1], weight.shape[1]) if need_x else 0),
        grad.new_empty(out_features if need_bias else 0),
        grad.new_empty((x.shape[-1], b.shape[1]) if need_h else 0),
        grad.new_empty((out_features, left.shape[1]) if need_b else 0),
    )


def _linear_setup(ctx, inputs, output):
    x, weight, _, h, b, seed, ctx.scale, ctx.activation, ctx.dropout, ctx.stream, ctx.backend = inputs
    need_x, _, need_bias, need_h, need_b = ctx.needs_input_grad[:5]
    ctx.needs = [need_x, need_bias, need_h, need_b]
    tiled = not is_factored(ctx.activation, ctx.dropout)
    tiled_factors = tiled and (need_h or need_b)
    wanted = (
        (x, need_h or tiled_factors),
        (weight, need_x),
        (h, need_x or tiled_factors),
        (b, need_x or need_h or tiled_factors),
        (output[1], need_b and not tiled),
        (seed, need_x or tiled_factors),
    )
    keep(ctx, *(value if needed else None for value, needed in wanted))
    ctx.set_materialize_grads(False)


def _linear_gradients(ctx, grad, backward):
    settings = ctx.scale, ctx.activation, ctx.dropout, ctx.stream, ctx.needs, ctx.backend
    grads = backward(grad, *kept(ctx), *settings)
    dx, dbias, dh, db = (g if need else None for g, need in zip(grads, ctx.needs, strict=True))
    return dx, None, dbias, dh, db, None, None, None, None, None, None


linear_node = differentiable(linear, lambda *args: linear_backward(*args), _linear_setup, _linear_gradients)
