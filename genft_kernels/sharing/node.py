"""The factors of several layers, generated as one node of the autograd graph.

Factors are few and thin, and many layers' outputs hang on them, so the node asks for more than an ordinary one:

- It is computed in a graph of its own, within the node, which saved-tensor hooks do not reach: a checkpointed region
  whose recomputation finds the factors at hand saves as many tensors as its first run, and nothing is offloaded.
- It can be run backward more than once, as losses that share nothing but a generator ask. The first time frees the
  inner graph, a further one makes it anew, as long as the parameters are the same.
- A layer that had no part in the loss gets no gradient, rather than zeros.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config import GenFTConfig
from ..ops import first_order
from ..parameters import GeneratorParameters
from ..update import Factors, generate_factors


class Generation:
    """The factors of one call, until a backward has consumed them.

    `factors` has one entry for each adapted block, layer after layer; None once consumed.
    """

    factors: list[Factors] | None

    def __init__(
        self,
        layers: Sequence[nn.Module],
        dtype: torch.dtype,
        dropout: float,
        seed: Tensor | None,
        backend: str,
    ) -> None:
        """Generate for `layers`, which share a generator; differentiable where gradients are recorded.

        Args:
            layers: `GenFTLinear`s on one device.
            dtype: of the factors.
            dropout, seed: of the column stage; int64 [blocks], or None without dropout.
            backend: an operation backend by name.
        """
        recipe = _Recipe(layers, dtype, dropout, seed, backend)
        parameters = recipe.parameters_of(layers)
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            flat = _Generate.apply(recipe, weakref.ref(self), *parameters)
        else:
            flat = recipe.factors(parameters)
        blocks = len(recipe.weights)
        self.factors = [Factors(h, b, recipe.stream) for h, b in zip(flat[:blocks], flat[blocks:], strict=True)]


class _Recipe:
    """How factors follow from parameters: all that the computation takes besides them."""

    stream: int  # known after the first call of `factors`

    def __init__(self, layers: Sequence[nn.Module], dtype, dropout, seed, backend) -> None:
        generator = layers[0].generator
        self.config: GenFTConfig = generator.config
        self.options = dict(dtype=dtype, dropout=dropout, seed=seed, backend=backend)
        self.weights = [weight for layer in layers for weight in layer.adapted_weights()]
        self.shared_names = tuple(generator.shared_parameters())
        self.specific_names = layers[0].specific_names
        # The layer of each block.
        self.owners = [index for index, layer in enumerate(layers) for _ in layer.blocks[1]]

    def parameters_of(self, layers: Sequence[nn.Module]) -> list[Tensor]:
        """The shared ones, then each layer's own."""
        own = [parameter for layer in layers for parameter in layer.specific_parameters()]
        return [*layers[0].generator.shared_parameters().values(), *own]

    def owner(self, position: int) -> int | None:
        """The layer whose parameter it is, None for a shared one."""
        position -= len(self.shared_names)
        return None if position < 0 else position // len(self.specific_names)

    def factors(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """h [in, k] of each block, then b [out, k] of each block."""
        device, count = self.weights[0].device, len(self.shared_names)
        shared = dict(zip(self.shared_names, parameters, strict=False))
        own = parameters[count:]
        specific = {}
        for index, name in enumerate(self.specific_names):
            of_layers = own[index :: len(self.specific_names)]
            specific[name] = torch.stack([of_layers[owner] for owner in self.owners])
        with torch.autocast(device.type, enabled=False):
            stacked = GeneratorParameters.concatenated(shared, specific, device, len(self.weights))
            h, b, self.stream = generate_factors(self.weights, stacked, self.config, **self.options)
        return [*h.unbind(0), *b.unbind(0)]

    def graph(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(leaves that stand for the parameters, factors that hang on them)."""
        leaves = [parameter.detach().requires_grad_(parameter.requires_grad) for parameter in parameters]
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            return leaves, self.factors(leaves)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor.detach()  # an operation that saves its own output would otherwise keep itself alive


class _Generate(torch.autograd.Function):
    """(parameters) -> factors."""

    @staticmethod
    def forward(ctx, recipe: _Recipe, generation: weakref.ref[Generation], *parameters: Tensor):
        ctx.recipe, ctx.generation, ctx.parameters = recipe, generation, parameters
        ctx.versions = [parameter._version for parameter in parameters]
        ctx.graphs = [recipe.graph(parameters)]  # a list, because taking from it is atomic
        ctx.set_materialize_grads(False)
        _, outputs = ctx.graphs[0]
        results = tuple(output.detach() for output in outputs)
        fixed = [result for result, output in zip(results, outputs, strict=True) if not output.requires_grad]
        ctx.mark_non_differentiable(*fixed)
        return results

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        generation = ctx.generation()
        if generation is not None:
            generation.factors = None
        leaves, outputs = _Generate._take_graph(ctx)
        used = [i for i, grad in enumerate(grads) if grad is not None and outputs[i].requires_grad]
        owners = {ctx.recipe.owners[i % len(ctx.recipe.owners)] for i in used} | {None}
        wanted = [i for i, leaf in enumerate(leaves) if leaf.requires_grad and used and ctx.recipe.owner(i) in owners]
        results = [None] * len(leaves)
        found = (
            torch.autograd.grad(
                [outputs[i] for i in used], [leaves[i] for i in wanted], [grads[i] for i in used], allow_unused=True
            )
            if wanted
            else ()
        )
        for i, grad in zip(wanted, found, strict=True):
            results[i] = grad
        return None, None, *results

    @staticmethod
    def _take_graph(ctx):
        try:
            return ctx.graphs.pop()
        except IndexError:  # a further backward
            if [parameter._version for parameter in ctx.parameters] != ctx.versions:
                raise RuntimeError(
                    "a parameter of the adapter changed between two backward passes through the same generation"
                ) from None
            return ctx.recipe.graph(ctx.parameters)
