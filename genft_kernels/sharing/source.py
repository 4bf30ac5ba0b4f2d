"""`Source`: all that a layer's factors are generated from, as one value; `Settings`: under what circumstances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..config import GenFTConfig
from ..frozen_weight import FrozenWeight

if TYPE_CHECKING:
    from .share import Share


class Source(NamedTuple):
    """All that the factors of one layer are generated from, as it is now; and what decides for how long they hold."""

    config: GenFTConfig
    weight: Tensor  # W, as it is stored; of one that is quantised, the codes
    blocks: Sequence[Tensor | FrozenWeight]  # its adapted blocks, each [out, in] of the generator; views
    shared: dict[str, Tensor]  # the generator's tensors
    own: dict[str, Tensor]  # the layer's
    backend: str  # as the layer was told, "auto" included
    dropout: float  # of the column stage, in effect
    training: bool
    obstacle: str | None  # what the layer knows against sharing

    @property
    def cell(self) -> tuple[object, ...]:
        """A key that layers must agree in to be generated together.

        In what trains, too: a factor has a gradient here if it has one in a generation of the layer alone, as the
        repetition of a checkpointed region may make.
        """
        trained = tuple(tensor.requires_grad for tensor in self.own.values())
        quantised = isinstance(self.blocks[0], FrozenWeight)
        return self.weight.device, self.weight.dtype, quantised, self.backend, self.dropout, trained

    @property
    def watched(self) -> list[Tensor]:
        """W and the layer's own tensors: with the shared ones, all whose change ends the factors."""
        return [self.weight, *self.own.values()]

    @property
    def thin(self) -> list[Tensor]:
        """All that trains: the shared tensors, then the layer's own."""
        return [*self.shared.values(), *self.own.values()]

    def reason_to_stay_alone(self) -> str | None:
        """Why the layer is neither generated together with others nor its factors kept; None if it can be."""
        if self.obstacle is not None:
            return self.obstacle
        quantised = isinstance(self.blocks[0], FrozenWeight)
        for tensor in (self.weight, *self.thin):
            if tensor.is_meta:
                return "its parameters are on the meta device (offloaded)"
            if tensor.is_inference():
                return "its parameters were made in inference mode, where changes cannot be seen"
            if not isinstance(tensor, nn.Parameter) and not (tensor is self.weight and quantised):
                return "its parameters are computed (pruned, parametrized, a replica)"
        return None


class Settings(NamedTuple):
    """The circumstances that factors are generated under."""

    backend: str
    dtype: torch.dtype
    dropout: float  # of the column stage, in effect
    gradients: bool
    inference: bool
    stream: tuple[int, bool] | None  # on CUDA, the stream and whether it is being captured

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph is being made of what is computed."""
        return self.stream is not None and self.stream[1]


class Layer(Protocol):
    """A layer, or whatever has factors: all that sharing reads of it is one value, and of that the tensors alone."""

    share: Share | None  # as its group has it, for who may take it without asking the group

    def source(self) -> Source:
        """All that its factors are generated from, as it is now."""
        ...

    def watched(self) -> list[Tensor]:
        """W and the layer's own tensors, as `source` has them."""
        ...


def is_tensor_subclass(tensor: Tensor | FrozenWeight) -> bool:
    """Whether a parameter is more than a plain tensor in memory: sharded, quantised, fake."""
    return isinstance(tensor, Tensor) and type(tensor) not in (Tensor, nn.Parameter)
