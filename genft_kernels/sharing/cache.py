"""Generation for all layers of a shape at once, kept for as long as it holds.

The factors of a layer do not depend on its input, so the first layer that is asked generates for its whole group, the
layers that share its generator; the others find theirs at hand. They hold until

- a parameter or W changes, is moved or replaced, or the dtype, the gradient mode or the training mode changes;
- an optimizer steps on a parameter: the fused ones leave no trace in its version;
- a backward pass has consumed them;
- where the column stage has dropout, a layer asks again: each forward has masks of its own.

So without gradients they hold until a parameter changes. A change through `parameter.data` cannot be seen, but each
`eval()` has them generated anew.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..update import Factors
from .node import Generation


class Settings(NamedTuple):
    """What factors are generated under. Only layers that agree in the first four are generated together."""

    device: torch.device
    weight_dtype: torch.dtype
    backend: str
    dropout: float  # of the column stage, in effect
    dtype: torch.dtype
    gradients: bool
    inference: bool
    stream: tuple[int, bool] | None  # on CUDA, the stream and whether it is being captured


class Tensors:
    """Which tensors there were, and in which state; it keeps none of them alive."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._states = [(weakref.ref(tensor), _state(tensor)) for tensor in tensors]

    def unchanged(self, tensors: Iterable[Tensor]) -> bool:
        """Whether `tensors` are the same ones, and as they were; False where that cannot be seen."""
        for tensor, (reference, state) in zip(tensors, self._states, strict=True):
            if state is None or reference() is not tensor or _state(tensor) != state:
                return False
        return True


def _state(tensor: Tensor) -> tuple | None:
    """None for a tensor made in inference mode: it has no version."""
    return None if tensor.is_inference() else (tensor._version, tensor.data_ptr(), tensor.requires_grad)


class Share:
    """One layer's part of a generation."""

    def __init__(self, generation: Generation, blocks: slice, settings: Settings, layer: nn.Module) -> None:
        self.generation, self.settings, self.taken = generation, settings, False
        self._blocks = blocks
        self._common = Tensors(layer.generator.shared_parameters().values())
        self._own = Tensors(layer.generation_inputs())
        self._steps = layer.generator.group.steps

    @property
    def factors(self) -> list[Factors]:
        """Those of the layer's adapted blocks, of a fresh generation."""
        return self.generation.factors[self._blocks]

    def holds(self, layer: nn.Module) -> bool:
        """Whether what the factors were generated from is as it was."""
        generator = layer.generator
        return (
            self._steps == generator.group.steps
            and self._own.unchanged(layer.generation_inputs())
            and self._common.unchanged(generator.shared_parameters().values())
        )

    def take(self, layer: nn.Module, settings: Settings) -> list[Factors] | None:
        """The factors for a forward of `layer`, or None if they do not hold for it."""
        factors = self.generation.factors  # read once: the backward of another thread may consume them meanwhile
        if factors is None or self.settings != settings or (self.taken and settings.dropout > 0):
            return None
        if not self.holds(layer):
            return None
        self.taken = True
        return factors[self._blocks]


_groups: weakref.WeakSet[LayerGroup] = weakref.WeakSet()


def _after_step(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    stepped = {id(parameter) for part in optimizer.param_groups for parameter in part["params"]}
    for group in list(_groups):
        if any(id(parameter) in stepped for parameter in group.parameters()):
            group.steps += 1
            group.forget()


register_optimizer_step_post_hook(_after_step)


class LayerGroup:
    """The layers that share a generator, and the factors last generated for each.

    `generations` counts the calls of the generator, `steps` those of optimizers that train it. A copy of the group, as
    in a copied model, is empty: the copied layers join the group of their own generator.
    """

    def __init__(self) -> None:
        self.generations = self.steps = 0
        self.accumulation = None  # an `accumulation.Accumulation` while one is under way
        self.sharded = False
        self._shares: weakref.WeakKeyDictionary[nn.Module, Share | None] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        _groups.add(self)

    def __reduce__(self):
        return LayerGroup, ()

    @property
    def layers(self) -> list[nn.Module]:
        """The layers, in the order in which they joined."""
        return list(self._shares)

    def join(self, layer: nn.Module) -> None:
        """Make `layer` one of the group."""
        self._shares[layer] = None

    def forget(self, layer: nn.Module | None = None) -> None:
        """Drop the factors of `layer`, or of all layers."""
        for each in self.layers if layer is None else [layer]:
            if each in self._shares:
                self._shares[each] = None

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained in the generator and the layers."""
        layers = self.layers
        own = [parameter for layer in layers for parameter in layer.specific_parameters()]
        return [*layers[0].generator.shared_parameters().values(), *own] if layers else []

    def factors_for(self, layer: nn.Module, dtype: torch.dtype, backend: str, seeds: list[Tensor]) -> list[Factors]:
        """The factors of the layer's adapted blocks in `dtype`.

        Args:
            backend: an operation backend by name.
            seeds: of this forward, int64 [1] for each adapted block. Where the layer makes the generation, they are
                its seeds in the column stage too. Unused where that has no dropout.
        """
        device = layer.weight.device
        settings = Settings(
            device,
            layer.weight.dtype,
            backend,
            layer.column_dropout,
            dtype,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            _stream(device),
        )
        with self._lock:
            if self.accumulation is not None and not settings.inference:
                return self.accumulation.factors_for(self, layer, settings, seeds)
            if settings.dropout > 0 and _may_be_repeated():
                # The repetition draws this forward's seeds again, but nothing that a group drew.
                return self.generate([layer], settings, seeds)[layer].factors
            share = self._shares.get(layer)
            factors = None if share is None else share.take(layer, settings)
            return self._renew(layer, settings, seeds) if factors is None else factors

    def together_with(self, layer: nn.Module) -> list[nn.Module]:
        """The layers to generate when `layer` asks, itself first."""
        if layer not in self._shares or obstacle(layer) is not None:  # a replica is in no group
            return [layer]
        cell = _cell(layer)
        others = [each for each in self.layers if each is not layer and _cell(each) == cell]
        return [layer, *(each for each in others if obstacle(each) is None)]

    def generate(self, layers: list[nn.Module], settings: Settings, seeds: list[Tensor]) -> dict[nn.Module, Share]:
        """One generation for `layers`; `seeds` are those of the first one, the others' follow from them."""
        counts = [len(layer.blocks[1]) for layer in layers]
        seed = None
        if settings.dropout > 0:
            # Nothing is drawn: the repetition of a checkpointed region would not draw it. Keys that differ by one give
            # Philox streams that have nothing in common.
            others = torch.arange(1, 1 + sum(counts[1:]), device=settings.device)
            seed = torch.cat([*seeds, seeds[0] + others])
        self.generations += 1
        generation = Generation(layers, settings.dtype, settings.dropout, seed, settings.backend)
        shares, start = {}, 0
        for layer, count in zip(layers, counts, strict=True):
            shares[layer] = Share(generation, slice(start, start + count), settings, layer)
            start += count
        return shares

    def explain(self) -> list[str]:
        """A line for each set of layers that are generated together, and for each reason to generate alone."""
        layers = self.layers
        if not layers:
            return []
        generator = layers[0].generator
        shape = f"{generator.in_features}x{generator.out_features}"
        reasons = {layer: obstacle(layer) for layer in layers}
        together = Counter(_cell(layer) for layer, reason in reasons.items() if reason is None)
        alone = Counter(reason for reason in reasons.values() if reason is not None)
        return [f"{shape}: {_layers(n)} on {cell[0]} in one generation" for cell, n in together.items()] + [
            f"{shape}: {_layers(n)} each in a generation of its own: {reason}" for reason, n in alone.items()
        ]

    def _renew(self, layer: nn.Module, settings: Settings, seeds: list[Tensor]) -> list[Factors]:
        in_backward = torch._C._current_graph_task_id() != -1
        # In a backward (reentrant checkpointing) the gradient of a whole group would be computed for each region.
        shares = self.generate([layer] if in_backward else self.together_with(layer), settings, seeds)
        if not in_backward and layer in self._shares:
            self._shares.update(shares)
        shares[layer].taken = True
        return shares[layer].factors


def obstacle(layer: nn.Module) -> str | None:
    """Why a layer is neither generated together with others nor its factors kept; None if it can be."""
    if layer.merged:
        return "it is merged"
    if layer.sharded or layer.generator.group.sharded:
        return "its parameters are sharded, quantised or of another tensor class"
    if layer.frozen_weight.shape != (layer.out_features, layer.in_features):
        return "its weight is not resident"
    for tensor in (*layer.generation_inputs(), *layer.generator.shared_parameters().values()):
        if tensor.device.type == "meta":
            return "its parameters are on the meta device (offloaded)"
        if tensor.is_inference():
            return "its parameters were made in inference mode, where changes cannot be seen"
    return None


def is_tensor_subclass(tensor: Tensor) -> bool:
    """Whether a parameter is more than a plain tensor in memory: sharded, quantised, fake."""
    return type(tensor) not in (Tensor, nn.Parameter)


def _cell(layer: nn.Module) -> tuple:
    """What layers must agree in to be generated together."""
    weight = layer.weight
    return weight.device, weight.dtype, layer.backend, layer.column_dropout


def _may_be_repeated() -> bool:
    """Whether this forward may be one of a checkpointed region, or is its repetition."""
    return (
        not torch.is_grad_enabled()  # as reentrant checkpointing runs the region first
        or torch._C._current_graph_task_id() != -1  # within a backward
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # as the other kind does
    )


def _stream(device: torch.device) -> tuple[int, bool] | None:
    if device.type != "cuda":
        return None
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"
