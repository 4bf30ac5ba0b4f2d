"""`GenFTUpdate`: one layer's part in generated updates: its own units, and all that its factors are generated from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _torch_private, backends, reference
from .arguments import check_type
from .checks import is_freed, is_sharded
from .config import GenFTConfig
from .frozen_weight import FrozenWeight
from .generator import GenFTGenerator, draw_up, registered, zeroed_names
from .optimizer_steps import watch_optimizers
from .parameters import GeneratorParameters, specific_shapes
from .row_blocks import RowBlocks
from .sharing.share import Share
from .sharing.source import Source, is_tensor_subclass


class GenFTUpdate(nn.Module):
    """The units of one layer's own, beside a generator that it shares and a frozen weight that somebody else holds.

    `GenFTLinear` is one that holds the weight itself. The units are `specific_down [r, in]` and `specific_up [out, r]`
    where both stages share them, else `column_specific_down [r, in]`, `column_specific_up [in, r]`,
    `row_specific_down [r, out]`, `row_specific_up [out, r]`, as far as the stages exist.
    """

    generator: GenFTGenerator  # declared, since what stands in a module has no type otherwise
    specific_names: tuple[str, ...]
    blocks: RowBlocks  # how the weight's rows are cut, and which blocks are adapted by these units
    share: Share | None = None  # its part of the last generation, as long as that is held
    merged: bool = False
    stored_transposed = False  # whether W lies as [in, out], as a Conv1D has it
    _sharded = False

    @property
    def stored_weight(self) -> Tensor:
        """W as it is stored, merged or not: [in, out] in a transformers `Conv1D`, else [out, in]."""
        raise NotImplementedError

    def join(
        self,
        generator: GenFTGenerator,
        backend: str,
        shape: tuple[int, int],
        blocks: tuple[int | Sequence[int], Sequence[int]] | None = None,
    ) -> None:
        """Make the units for a weight of `shape` (in, out), and become one of the layers that share `generator`.

        Raises:
            ValueError: the generator is of another shape than the adapted blocks, or these are of several.
        """
        backends.check_name(backend)
        in_features, out_features = shape
        self.blocks = RowBlocks() if blocks is None else RowBlocks.checked("blocks", blocks)
        rows, *others = self.blocks.by_rows(out_features)
        if others:
            raise ValueError(f"blocks of {rows} and of {others[0]} rows need a generator each")
        has, wanted = (generator.in_features, generator.out_features), (in_features, rows)
        if has != wanted:
            raise ValueError(f"the generator is for in x out = {has[0]}x{has[1]}, the layer is {wanted[0]}x{wanted[1]}")
        self.backend = backend
        weight = self.stored_weight
        shapes = {name: self._shape_of_units(s) for name, s in specific_shapes(generator.config, *wanted).items()}
        for name, matrix_shape in shapes.items():
            data = torch.empty(matrix_shape, device=weight.device, dtype=adapter_dtype(self.frozen_weight.dtype))
            self.register_parameter(name, nn.Parameter(data))
        self.__dict__["specific_names"] = tuple(shapes)
        self.reset_specific_parameters()
        self._join_group()

    def _shape_of_units(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """That of a tensor of the layer's own: one matrix, or [n, ...] where n parts of the layer have one each."""
        return shape

    def _join_group(self) -> None:
        self.generator.group.join(self)
        watch_optimizers()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._join_group()  # a copied layer that of its copied generator

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        generator, held = self.generator, any(prefix + name in state_dict for name in self.specific_names)
        if held and generator.tensor_names and generator.left_out_of_load is None:
            generator.left_out_of_load = True  # unless its own turn is still to come

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GenFTUpdate:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.generator.group.forget(self)  # whose graph would keep W where it was
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == _torch_private.USES_ORIGINAL_PARAMETERS and not value:  # FSDP1 says so of all that it will wrap
            raise ValueError(
                "GenFT does not run under FullyShardedDataParallel (FSDP1), which flattens frozen and trained "
                "parameters into one: use fully_shard (FSDP2; fsdp_version: 2 in accelerate) or DistributedDataParallel"
            )
        super().__setattr__(name, value)
        if isinstance(value, Tensor):  # FSDP shards so, and in a forward the parameters are plain ones
            self.__dict__["_sharded"] = self._sharded or is_tensor_subclass(value)

    def reset_specific_parameters(self) -> None:
        """Draw the layer's own units anew; where `zero_delta` says more, as it says."""
        config = self.config
        zeroed = zeroed_names(config)
        for name in self.specific_names:
            parameter, end = getattr(self, name), name.rpartition("_")[2]
            shared = name.replace("_specific", "")  # tied units are "specific_up": the last stage's, and the first's
            for matrix in parameter.detach() if parameter.dim() == 3 else (parameter,):
                if shared in zeroed or (name == "specific_up" and config.zero_delta):
                    nn.init.zeros_(matrix)
                elif config.zero_delta == "down":
                    draw_up(matrix)
                else:
                    _initialise(matrix, config.init_specific_up if end == "up" else config.init_specific_down)

    @property
    def config(self) -> GenFTConfig:
        return self.generator.config

    @property
    def frozen_weight(self) -> Tensor | FrozenWeight:
        """W [out, in], merged or not: a view where it is stored transposed, a handle where it is quantised."""
        return self.stored_weight.t() if self.stored_transposed else self.stored_weight

    def generates_alone(self) -> bool:
        """Whether this forward has to generate the layer's factors anew, and for no other layer."""
        # A compiled graph cannot hold what outlives it, and sharded parameters cannot be watched.
        compiling = torch.compiler.is_compiling()
        return compiling or self._is_sharded(self.frozen_weight) or _torch_private.tensors_are_fake()

    def _is_sharded(self, weight: Tensor | FrozenWeight) -> bool:
        """Whether parameters are, or have been, of a tensor class of their own, as FSDP's outside of a forward."""
        return self._sharded or self.generator.sharded or is_tensor_subclass(weight)

    def specific_parameters(self) -> dict[str, Tensor]:
        """The layer's own trained tensors by name."""
        return dict(zip(self.specific_names, registered(self, self.specific_names), strict=True))

    def source(self) -> Source:
        """All that the layer's factors are generated from, as it is now."""
        config, blocks = self.config, self.adapted_blocks()
        return Source(
            config,
            self.stored_weight,
            blocks,
            self.generator(),
            self.specific_parameters(),
            self.backend,
            config.dropout if self.training and config.transform == "both" else 0.0,
            self.training,
            self._obstacle(blocks[0]),
        )

    def adapted_blocks(self) -> Sequence[Tensor | FrozenWeight]:
        """The blocks of the frozen weight that are adapted, merged or not; views, or handles."""
        cut = self.blocks.split(self.frozen_weight)
        return [cut[index] for index in self.blocks.adapted]

    def watched(self) -> list[Tensor]:
        """W and the layer's own tensors, as `source` has them, without all that is more work."""
        return [self.stored_weight, *registered(self, self.specific_names)]

    def _obstacle(self, block: Tensor | FrozenWeight) -> str | None:
        """The sentence of `Source.obstacle`."""
        if self.merged:
            return "it is merged"
        if self._is_sharded(block):
            return "its parameters are sharded, quantised or of another tensor class"
        if block.shape != (self.generator.out_features, self.generator.in_features):
            return "its weight is not resident"
        return None

    def parameters_of_generator(self) -> GeneratorParameters:
        """The layer's trained tensors on its device, shared and specific units concatenated; differentiable."""
        return GeneratorParameters.concatenated(
            self.shared_tensors(), self.specific_parameters(), self.stored_weight.device
        )

    def shared_tensors(self) -> dict[str, Tensor]:
        """The generator's tensors by name, to be computed with.

        Raises:
            RuntimeError: they are not there, as FSDP2 leaves those of a unit of its own.
        """
        shared = self.generator()
        if self.generator.sharded and not torch.compiler.is_compiling():
            sharded = is_sharded(self.stored_weight)
            if any(not sharded if is_sharded(each) else is_freed(each) for each in shared.values()):
                raise RuntimeError(
                    "fully_shard was called on a generator, or on model.genft_generators, whose tensors are not there "
                    "when a layer asks: leave generators to the root's fully_shard(model)"
                )
        return shared

    def delta_weight(self) -> Tensor:
        """dW [out, in] without dropout, generated from the frozen W, in float32 or wider; differentiable.

        Rows of blocks that are not adapted are zero.
        """
        weight = self.frozen_weight
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        params, blocks = self.parameters_of_generator(), self.blocks
        updates = [
            reference.delta_weight(block, params, self.config) if index in blocks.adapted else torch.zeros_like(block)
            for index, block in enumerate(blocks.split(weight))
        ]
        return updates[0] if blocks.count == 1 else torch.cat(updates)


def refresh(model: nn.Module) -> nn.Module:
    """Drop all factors that are held for layers of `model`, and return it: the next forward generates anew.

    Needed only after a change of W that neither its version nor its diagonal tells of (docs/using.md#training).

    Raises:
        TypeError: `model` is no module.
    """
    check_type("model", model, nn.Module)
    for module in model.modules():
        if isinstance(module, GenFTUpdate):
            module.generator.group.forget(module)
    return model


def adapter_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """Trained parameters are float32 over a 16-bit weight, else of its dtype (docs/method.md#precision)."""
    return torch.promote_types(weight_dtype, torch.float32)


@torch.no_grad()
def _initialise(parameter: Tensor, init: str) -> None:
    if init == "zeros":
        nn.init.zeros_(parameter)
    elif init == "kaiming_uniform":
        nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
    elif init == "xavier_uniform":
        nn.init.xavier_uniform_(parameter)
    else:
        nn.init.normal_(parameter, std=0.01)
