"""`Operation`: how a custom op and its backward become one node of the autograd graph.

A plain node takes a fraction of a custom op's time to make, and calls the backend itself. Where something listens to
the dispatcher (compilation, tracing, a dispatch mode), it is the custom op. But a compiler is shown PyTorch's products
where these are all there is to an operation: in a compiled graph a custom op still takes the host a tenth of a
millisecond, more than a whole plain layer does, and nothing can be fused with it.

In W's place the nodes take a handle of one that is stored quantised (`FrozenWeight`): it is made dense for the
operation and again for its backward, and the node keeps the handle.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _torch_private
from .frozen_weight import FrozenWeight, opened


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a node's backward that is not differentiable: RuntimeError under `create_graph=True`.

    PyTorch's `once_differentiable` raises later, and not where the caller takes an unused input for a zero, as
    `torch.autograd.functional.hvp` does.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError('no second derivatives (create_graph=True): backend="reference" has them')
        return backward(ctx, *grads)

    return checked


class Operation:
    """A custom op with its gradient. Called, it gives the op's first result, by a plain node of the graph.

    Args:
        name: of the operation.
        op, backward_op: the custom ops `<name>` and `<name>_backward`.
        setup: saves in a context what `gradients` will need, given the op's inputs and outputs.
        gradients: (context, gradient of the first result, `backward_op`) -> the gradient of each input.
        compute: (backend, `<name>` or `<name>_backward`, its other arguments) -> its results, None where not wanted.
        by_pytorch: (the op's inputs) -> whether PyTorch's products are all there is to it, and to its backward;
            None: never.
    """

    def __init__(
        self,
        name: str,
        op: Any,
        backward_op: Callable[..., Any],
        setup: Callable[..., None],
        gradients: Callable[..., tuple[Any, ...]],
        compute: Callable[..., Any],
        by_pytorch: Callable[..., bool] | None = None,
    ) -> None:
        self._op, self._compute, self._by_pytorch = op, compute, by_pytorch
        self._name = name
        of_backward = f"{name}_backward"

        def of_op(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
            grads = (None,) * len(ctx.needs_input_grad) if grad is None else gradients(ctx, grad, backward_op)
            # An op wants a list for a list.
            lists = ([None] * len(need) if isinstance(need, (list, tuple)) else None for need in ctx.needs_input_grad)
            return tuple(each if grad is None else grad for each, grad in zip(lists, grads, strict=True))

        op.register_autograd(of_op, setup_context=setup)

        def run_backward(*args: Any) -> tuple[Any, ...]:
            if _torch_private.dispatch_modes_active():
                results: tuple[Any, ...] = backward_op(*map(opened, args))
                return results
            return compute(args[-1], of_backward, *args[:-1])

        class Node(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Tensor:
                *inputs, results = args
                results = self._run(*inputs) if results is None else results
                setup(ctx, inputs, results)
                # `data`, because a view that is made within a node may not be changed in place, as ReLU(inplace=True)
                # does.
                return results[0].data

            @staticmethod
            @first_order
            def backward(ctx: Any, grad: Tensor | None) -> Any:
                if grad is None:
                    return (None,) * len(ctx.needs_input_grad)
                return *gradients(ctx, grad, run_backward), None  # `results` has none

        class TracedNode(torch.autograd.Function):
            """For a compiler, which looks into it: the products of PyTorch that an operation comes to."""

            @staticmethod
            def forward(ctx: Any, *args: Any) -> Tensor:
                results = compute("eager", name, *args[:-1])
                setup(ctx, args, results)
                return results[0]

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Any:
                return gradients(ctx, grad, lambda *args: compute("eager", of_backward, *args[:-1]))

        self._node: Any = Node
        self._traced: Any = TracedNode
        # `Function.apply` goes through all arguments for what transforms have left behind, which any product takes as
        # it is: a fifth of the Python of a layer's forward.
        self._apply: Any = super(torch.autograd.Function, Node).apply

    def __call__(self, *args: Any) -> Tensor:
        first: Tensor
        compiling = torch.compiler.is_compiling()
        if compiling and not torch.compiler.is_exporting() and self._by_pytorch and self._by_pytorch(*args):
            first = self._traced.apply(*map(opened, args))
            return first
        if compiling or (_torch_private.dispatch_modes_active() and not any(map(_is_handle, args))):
            if not compiling:
                _tell_flop_counters()
            first = self._op(*map(opened, args))[0]
            return first
        return self._first(None, *args)

    def unheard(self, *args: Any) -> Tensor:
        """As a call, where nothing listens or transforms, as who calls has seen: a dozen Python calls fewer."""
        if not torch.is_grad_enabled():
            return self._compute(args[-1], self._name, *args[:-1])[0]
        first: Tensor = self._apply(*args, None)
        return first

    def results(self, *args: Any) -> tuple[Tensor, Any]:
        """All results, without gradients."""
        with torch.no_grad():
            return self._run(*args)

    def again(self, results: tuple[Tensor, Any], *args: Any) -> Tensor:
        """The results of a call, where they are known."""
        return self._first(results, *args)

    def _first(self, results: tuple[Tensor, Any] | None, *args: Any) -> Tensor:
        if torch.is_grad_enabled():
            apply = self._node.apply if _torch_private.transforms_active() else self._apply
            first: Tensor = apply(*args, results)
            return first
        return (self._run(*args) if results is None else results)[0]

    def _run(self, *args: Any) -> Any:
        if _torch_private.dispatch_modes_active():  # within a node that keeps a handle: let them see the op
            _tell_flop_counters()
            return self._op(*map(opened, args))
        return self._compute(args[-1], self._name, *args[:-1])


def _is_handle(value: object) -> bool:
    return isinstance(value[0] if isinstance(value, list) else value, FrozenWeight)


def keep(ctx: Any, *values: Tensor | FrozenWeight | None) -> None:
    """Save tensors for backward, and the handles among them beside: what they stand for is not kept."""
    ctx.handles = {}
    if FrozenWeight in map(type, values):
        ctx.handles = {place: value for place, value in enumerate(values) if isinstance(value, FrozenWeight)}
        values = tuple(None if place in ctx.handles else value for place, value in enumerate(values))
    ctx.save_for_backward(*values)


def kept(ctx: Any) -> list[Any]:
    """The tensors that were kept."""
    tensors = list(ctx.saved_tensors)
    for place, handle in ctx.handles.items():
        tensors[place] = handle
    return tensors


def _tell_flop_counters() -> None:
    """Have a FLOP counter know the operations. Who uses one has imported its module, which brings Triton with it."""
    if "torch.utils.flop_counter" in sys.modules:
        from .flops import tell_counters

        tell_counters()
