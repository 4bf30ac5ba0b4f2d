"""The factors of several layers, generated as one node of the autograd graph.

Factors are few and thin, and many layers' outputs hang on them, so the node asks for more than an ordinary one:

- It is computed in a graph of its own, within the node, which saved-tensor hooks do not reach: a checkpointed region
  whose recomputation finds the factors at hand saves as many tensors as its first run, and nothing is offloaded.
- It can be run backward more than once, as losses that share nothing but a generator ask. The first time frees the
  inner graph, a further one makes it anew, as long as the parameters are the same.
- A layer that had no part in the loss gets no gradient, rather than zeros.
- Hooks keep autograd from seeing that W or a parameter changed in place before the backward, so the node looks itself.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activations import activate
from ..frozen_weight import FrozenWeight, dense_once
from ..operation import Operation, first_order
from ..parameters import GeneratorParameters, for_blocks
from ..update import Factors, Known, generate_factors, run_operation, unit_multiple
from .source import Settings, Source


class Generation:
    """The factors of one call, until a backward has consumed them.

    `factors` has one entry for each adapted block, layer after layer; None once consumed.
    """

    factors: list[Factors] | None

    def __init__(self, recipe: Recipe) -> None:
        """Generate; differentiable where gradients are recorded."""
        parameters = recipe.parameters
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            flat = _Generate.apply(recipe, weakref.ref(self), *parameters)  # type: ignore[no-untyped-call]
        else:
            flat = recipe.factors(parameters).flat()
        blocks = len(recipe.weights)
        self.factors = [Factors(h, b, recipe.stream) for h, b in zip(flat[:blocks], flat[blocks:], strict=True)]


class _Stacks(NamedTuple):
    """The factors of all blocks as the generation makes them, which is less to keep and to ask for than each alone."""

    h: Tensor  # [L, in, k]
    b: Tensor  # [L, out, k]

    def flat(self) -> list[Tensor]:
        """h [in, k] of each block, then b [out, k] of each block; views."""
        return [*self.h.unbind(0), *self.b.unbind(0)]


class Recipe:
    """How factors follow from parameters: these, and all that the computation takes besides them.

    Args:
        sources: of layers on one device that share a generator.
        seed: of the column stage's dropout, int64 [blocks]; None without.
        norms: of the blocks of W, if they are known.
    """

    stream: int  # known after the first call of `factors`

    def __init__(
        self, sources: Sequence[Source], settings: Settings, seed: Tensor | None, norms: Tensor | None
    ) -> None:
        self.config, self.settings, self.seed, self.norms = sources[0].config, settings, seed, norms
        self.weights = [block for source in sources for block in source.blocks]
        self.shared_names, self.specific_names = tuple(sources[0].shared), tuple(sources[0].own)
        self.owners = [index for index, source in enumerate(sources) for _ in source.blocks]  # the layer of each block
        self.parameters = [*sources[0].shared.values(), *(own for source in sources for own in source.own.values())]
        self.names = self.shared_names + self.specific_names * len(sources)  # of the parameters
        of_own = (index for index in range(len(sources)) for _ in self.specific_names)
        self.owners_of_parameters = [*(None for _ in self.shared_names), *of_own]  # None: shared

    def factors(self, parameters: Sequence[Tensor], run: Callable[..., Tensor] = run_operation) -> _Stacks:
        """The factors of all blocks; `run` as in `Known`."""
        device, count = self.weights[0].device, len(self.shared_names)
        shared = dict(zip(self.shared_names, parameters, strict=False))
        own = parameters[count:]
        specific = {}
        with torch.autocast(device.type, enabled=False):  # it has no stack of float16 tensors on a CPU
            for index, name in enumerate(self.specific_names):
                specific[name] = self._for_blocks(own[index :: len(self.specific_names)])
            backend, dtype, dropout, *_ = self.settings
            multiple = unit_multiple(device, dtype)
            stacked = GeneratorParameters.concatenated(shared, specific, device, len(self.weights), multiple)
            h, b, self.stream = generate_factors(
                self.weights, stacked, self.config,
                dtype=dtype, dropout=dropout, seed=self.seed, backend=backend, known=Known(self.norms, run),
            )  # fmt: skip
        return _Stacks(h, b)

    def _for_blocks(self, of_layers: Sequence[Tensor]) -> Tensor:
        """One of the layers' own tensors for each of their blocks."""
        if any(own.dim() == 3 for own in of_layers):
            counts = (self.owners.count(layer) for layer in range(len(of_layers)))
            return torch.cat([for_blocks(own, blocks) for own, blocks in zip(of_layers, counts, strict=True)])
        of_blocks = [of_layers[owner] for owner in self.owners]
        return torch.stack(of_blocks) if len(of_blocks) > 1 else of_blocks[0][None]  # not even a copy

    def graph(self, run: Callable[..., Tensor], keep: Callable[[Tensor], object]) -> tuple[list[Tensor], _Stacks]:
        """(leaves that stand for the parameters, factors that hang on them), in a graph that saves what `keep` gives.

        That must not be the tensor itself: an operation that saves its own output would keep itself alive.
        """
        leaves = [parameter.detach().requires_grad_(parameter.requires_grad) for parameter in self.parameters]
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, Tensor.detach):
            return leaves, self.factors(leaves, run)


class _Results:
    """Results of the stages that go over W, or over tiles of an update; of it their graph is made again."""

    def __init__(self) -> None:
        self._before: list[Tensor] = []  # what activations were applied to

    def record(self, operation: Operation, *args: Any) -> Tensor:
        """Run an operation, and keep what its activation, the last step, was applied to."""
        *_, activation, _ = args  # before the backend, in both schemas
        results = operation.results(*args)
        self._before.append(_kept(results[0] if activation == "identity" else results[1]))
        return operation.again(results, *args)

    def repeat(self) -> Callable[..., Tensor]:
        """Takes the operations' arguments in the same order, and gives the same."""
        recorded = iter(self._before)

        def again(operation: Operation, *args: Any) -> Tensor:
            *_, activation, _ = args
            before = next(recorded)
            return operation.again((activate(activation, before), before), *args)

        return again


def _version(tensor: Tensor | FrozenWeight) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _kept(tensor: Tensor) -> Tensor:
    """The part that is kept between forward and backward; a function of its own so that tests can count it."""
    return tensor.detach()


def _stacked(grads: Sequence[Tensor | None], stack: Tensor) -> Tensor:
    """[L, n, k] from the gradients of its parts, zero where there is none."""
    if any(grad is None for grad in grads):
        nothing = stack.new_zeros(stack.shape[1:])
        grads = [nothing if grad is None else grad for grad in grads]
    return torch.stack(list(grads))  # type: ignore[arg-type]


def _nothing(tensor: Tensor) -> None:
    """All that is kept for a graph that is made again."""


class _Generate(torch.autograd.Function):
    """(parameters) -> factors."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, generation: weakref.ref[Generation], *parameters: Tensor) -> Any:
        ctx.recipe, ctx.generation = recipe, generation
        ctx.versions = [[_version(tensor) for tensor in tensors] for tensors in (parameters, recipe.weights)]
        transform = recipe.config.transform
        # Of one stage its product with W is a factor, or what the graph keeps. A sum's factors are copies of both.
        ctx.results = None if transform == "sum" else _Results()
        run = run_operation if ctx.results is None else ctx.results.record
        keeps_graph = transform != "both"  # two stages: more than twice the factors, and quickly made again
        leaves, outputs = recipe.graph(run, _kept if keeps_graph else _nothing)
        ctx.graphs = [(leaves, outputs)] if keeps_graph else []  # a list, because taking from it is atomic
        ctx.set_materialize_grads(False)
        results = _Stacks(*map(Tensor.detach, outputs)).flat()
        blocks = len(recipe.weights)
        fixed = [not stack.requires_grad for stack in outputs for _ in range(blocks)]
        ctx.mark_non_differentiable(*itertools.compress(results, fixed))
        return tuple(results)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        generation = ctx.generation()
        if generation is not None:
            generation.factors = None
        recipe = ctx.recipe
        blocks = len(recipe.weights)
        graded = [i for i, grad in enumerate(grads) if grad is not None]
        owners = {recipe.owners[i % blocks] for i in graded} | {None}
        _Generate._check_unchanged(ctx, owners)
        try:
            leaves, outputs = ctx.graphs.pop()
        except IndexError:  # not kept, or a further backward
            run = run_operation if ctx.results is None else ctx.results.repeat()
            leaves, outputs = recipe.graph(run, Tensor.detach)
        of_stacks = [
            (stack, _stacked(of_blocks, stack))
            for stack, of_blocks in zip(outputs, (grads[:blocks], grads[blocks:]), strict=True)
            if stack.requires_grad and any(grad is not None for grad in of_blocks)
        ]
        owned = zip(leaves, recipe.owners_of_parameters, strict=True)
        wanted = [i for i, (leaf, owner) in enumerate(owned) if leaf.requires_grad and of_stacks and owner in owners]
        results: list[Tensor | None] = [None] * len(leaves)
        if wanted:
            used, of_used = zip(*of_stacks, strict=True)
            with dense_once():  # of a sum, the stages of one layer come one after the other
                found = torch.autograd.grad(used, [leaves[i] for i in wanted], of_used, allow_unused=True)
            for i, grad in zip(wanted, found, strict=True):
                results[i] = grad
        return None, None, *results

    @staticmethod
    def _check_unchanged(ctx: Any, owners: set[int | None]) -> None:
        """RuntimeError if what the factors of these layers come of has changed since."""
        recipe, (of_parameters, of_weights) = ctx.recipe, ctx.versions
        changed = [
            f"a parameter of the adapter, {name}"
            for name, owner, tensor, version in zip(
                recipe.names, recipe.owners_of_parameters, recipe.parameters, of_parameters, strict=True
            )
            if _version(tensor) != version and owner in owners
        ] + [
            "a frozen weight"
            for owner, tensor, version in zip(recipe.owners, recipe.weights, of_weights, strict=True)
            if _version(tensor) != version and owner in owners
        ]
        if changed:
            raise RuntimeError(
                f"{changed[0]}, was changed in place between the forward in which updates were generated from it and "
                "their backward"
            )
