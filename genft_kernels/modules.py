"""`GenFTLinear`: a frozen linear layer whose update is generated from its own weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adaptable import check_adaptable, is_conv1d
from .arguments import check_flag, check_type
from .checks import check_device, check_floating_dtype, check_sizes
from .config import GenFTConfig
from .frozen_weight import FrozenWeight, kind_of, kind_of_classes
from .generator import GenFTGenerator, registered
from .instance_forward import carry_instance_forward, share_hooks
from .merging import MarksMerged, MergeableUpdate
from .row_blocks import RowBlocks
from .sharing.source import is_tensor_subclass
from .together import updated_linear
from .units import GenFTUpdate, adapter_dtype

__all__ = ["GenFTGenerator", "GenFTLinear"]

MORE_BLOCKS = "more_blocks"


class GenFTLinear(MarksMerged, MergeableUpdate, nn.Linear):
    """A drop-in for `nn.Linear`: `weight` and `bias` frozen under the same names, plus a generated update.

    The layer's own trained units are parameters of it (`GenFTUpdate`), the shared ones are in `generator`.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`. Over a 16-bit weight the trained
            parameters are float32.
        config: the method's settings; defaults to the generator's, or to `GenFTConfig()`.
        generator: a shared generator of this shape; None makes one of the layer's own.
        backend: "auto", or a backend by name, which then never becomes another.

    Raises:
        ValueError: the generator's shape or configuration is not the layer's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: GenFTConfig | None = None,
        generator: GenFTGenerator | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(in_features=in_features, out_features=out_features)
        check_flag("bias", bias)
        check_type("config", config, GenFTConfig, optional=True)
        check_type("generator", generator, GenFTGenerator, optional=True)
        check_device(device)
        check_floating_dtype("dtype", dtype)
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        if generator is None:
            config = GenFTConfig() if config is None else config
            generator = GenFTGenerator(in_features, out_features, config, device, adapter_dtype(self.weight.dtype))
        elif config is not None and config != generator.config:
            raise ValueError("config and generator.config differ; pass only one of them")
        self.generator = generator
        self._adapt(generator, backend)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        generator: GenFTGenerator,
        *,
        blocks: tuple[int | Sequence[int], Sequence[int]] | None = None,
        backend: str = "auto",
        register_generator: bool = True,
    ) -> GenFTLinear:
        """Adapt an existing `nn.Linear` or transformers `Conv1D`, sharing its parameters.

        Args:
            linear: its `weight` and `bias` become the layer's, the same objects, and are frozen. One whose weight is
                quantised becomes the layer's `base_layer` (`register_frozen_weight`).
            generator: of the shape of the weight, or of one of its row blocks.
            blocks: (the number of equal row blocks in a fused weight, or the rows of each; the blocks to adapt); None
                adapts all of it. Blocks of another size are adapted by `adapt_more`.
            register_generator: False where another module owns the shared generator.

        Raises:
            TypeError: not a plain linear layer, a weight that is computed, or quantised and not to be made dense.
            ValueError: a meta weight, or a generator of another shape.
        """
        check_type("linear", linear, nn.Module)
        check_type("generator", generator, GenFTGenerator)
        check_flag("register_generator", register_generator)
        check_adaptable(linear)
        if kind_of(linear) is not None:
            from .quantised_linear import QuantisedGenFTLinear as cls  # noqa: N813  # which is one of these
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        share_hooks(linear, layer)
        layer._hold(linear)
        out_features, in_features = layer.frozen_weight.shape
        layer.in_features, layer.out_features = in_features, out_features
        if register_generator:
            layer.generator = generator
        else:  # a plain attribute: nn.Module does not see it
            layer.__dict__["generator"] = generator
        layer._adapt(generator, backend, blocks)
        # Where to go back to; not a submodule, because its parameters are the layer's.
        layer.__dict__["_original"] = linear
        carry_instance_forward(linear, layer)
        return layer.train(linear.training)

    def adapt_more(self, generator: GenFTGenerator, blocks: tuple[int | Sequence[int], Sequence[int]]) -> None:
        """Adapt further blocks of a fused weight, of which another generator has the shape and another module is owner.

        Raises:
            ValueError: the generator is of another shape, or the blocks are cut or adapted otherwise.
        """
        more = MoreBlocks(self, generator, self.backend, blocks)
        taken = [index for update in self.updates.values() for index in update.blocks.adapted]
        if more.blocks.cut != self.blocks.cut or set(taken) & set(more.blocks.adapted):
            raise ValueError(f"blocks {more.blocks} beside blocks {self.blocks} of one weight")
        if MORE_BLOCKS not in self._modules:
            self.add_module(MORE_BLOCKS, nn.ModuleDict().train(self.training))
        getattr(self, MORE_BLOCKS)[str(generator.out_features)] = more.train(self.training)

    @property
    def updates(self) -> dict[str, GenFTUpdate]:
        """Its updates by their paths within the layer: one, or one for each size of a fused weight's blocks."""
        more: Any = self._modules.get(MORE_BLOCKS) or {}
        return {"": self, **{f"{MORE_BLOCKS}.{rows}": update for rows, update in more.items()}}

    @property
    def all_blocks(self) -> RowBlocks:
        """How the weight's rows are cut, and which blocks are adapted, by whatever units."""
        adapted = (index for update in self.updates.values() for index in update.blocks.adapted)
        return self.blocks._replace(adapted=tuple(sorted(adapted)))

    def _adapt(self, generator: GenFTGenerator, backend: str, blocks: Any = None) -> None:
        self.join(generator, backend, (self.in_features, self.out_features), blocks)
        self._freeze()

    def _hold(self, linear: nn.Module) -> None:
        """Take W and the bias over."""
        source: Any = linear
        self.weight = source.weight
        if source.bias is None:
            self.register_parameter("bias", None)  # as nn.Linear has it: a forward finds it among the parameters
        else:
            self.bias = source.bias
        self.stored_transposed = is_conv1d(linear)

    def _freeze(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and is_tensor_subclass(value) and kind_of_classes(type(self), type(value)) is not None:
            raise TypeError(
                f"an adapted layer cannot be quantised (to {type(value).__name__}): quantise the model first, then "
                "call apply_genft"
            )
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Draw W, the bias and the layer's own units anew."""
        super().reset_parameters()
        if "specific_names" in vars(self):  # else it is nn.Linear's constructor that calls
            for update in self.updates.values():
                update.reset_specific_parameters()

    @property
    def stored_weight(self) -> Tensor:
        if self._unmerged is not None:
            return self._unmerged
        weight = self._parameters.get("weight")  # without the detour of an attribute
        return self.weight if weight is None else weight

    def delta_weight(self) -> Tensor:
        """dW [out, in] without dropout, generated from the frozen W, in float32 or wider; differentiable.

        Rows of blocks that are not adapted are zero.
        """
        _, *more = self.updates.values()
        return sum((update.delta_weight() for update in more), super().delta_weight())

    @property
    def _place(self) -> tuple[nn.Module, str]:
        return self, "weight"

    def _updated_weight(self) -> Tensor:
        delta = self.delta_weight()
        merged = (self.frozen_weight.to(delta.dtype) + delta).to(self.weight.dtype)
        return (merged.t() if self.stored_transposed else merged).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] of x [..., in], in x's dtype or autocast's (docs/architecture.md#life-of-x).

        Raises:
            RuntimeError: in training while merged; or as `functional.genft_linear`, as are ValueError and TypeError.
        """
        if not self.enabled:
            return F.linear(x, cast(Tensor, self.frozen_weight), self.bias)  # a quantised layer has its own forward
        if self._unmerged is not None:
            if self.training:
                raise RuntimeError("a merged layer does not train: call unmerge() or eval() first")
            return F.linear(x, self.weight.t() if self.stored_transposed else self.weight, self.bias)
        updates = list(self.updates.values()) if MORE_BLOCKS in self._modules else [self]
        weight, bias = registered(self, ("weight", "bias"))
        return updated_linear(x, weight.t() if self.stored_transposed else weight, bias, updates)

    def extra_repr(self) -> str:
        config = self.config
        parts = [
            super().extra_repr(),
            f"shared_dim={config.shared_dim}, specific_dim={config.specific_dim}",
            f"blocks={self.all_blocks}" if self.blocks.count > 1 else "",
            f"backend={self.backend!r}",
            "merged" if self.merged else "",
        ]
        return ", ".join(part for part in parts if part)


class UpdateOfLayer(GenFTUpdate):
    """Units over a weight that a layer above them holds."""

    layer: Any

    def __init__(self, layer: Any, generator: GenFTGenerator, backend: str, blocks: Any) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, generator=generator)  # not registered: they have owners
        out_features, in_features = self.frozen_weight.shape
        self.join(generator, backend, (in_features, out_features), blocks)

    @property
    def stored_weight(self) -> Tensor:
        return self.layer.stored_weight

    @property
    def frozen_weight(self) -> Tensor | FrozenWeight:
        return self.layer.frozen_weight


class MoreBlocks(UpdateOfLayer):
    """The units of further blocks of a fused weight, of another size than a layer's others."""

    @property
    def merged(self) -> bool:  # type: ignore[override]  # as the layer is
        return self.layer.merged

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}"
