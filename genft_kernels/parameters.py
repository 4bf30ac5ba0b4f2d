"""The tensors that a generator and its layers train: their names, shapes and order, here and in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from .config import GenFTConfig


class GeneratorParameters(NamedTuple):
    """The trained tensors of one layer's update, shared and specific units concatenated (docs/method.md#the-method).

    `k = shared_dim + specific_dim`; along `k` the shared units come first. A tensor that the configuration does
    not have is None: the row stage's under `transform="column"`, the column stage's under `"row"`, and every
    bias without `bias=True`.
    """

    column_down: torch.Tensor | None  # A1 [k, in]
    column_up: torch.Tensor | None  # B1 [in, k]
    row_down: torch.Tensor | None  # A2 [k, out]
    row_up: torch.Tensor | None  # B2 [out, k]
    column_down_bias: torch.Tensor | None = None  # a1 [k]
    column_up_bias: torch.Tensor | None = None  # c1 [in]
    row_down_bias: torch.Tensor | None = None  # a2 [k]
    row_up_bias: torch.Tensor | None = None  # c2 [out]

    @classmethod
    def concatenated(
        cls,
        shared: Mapping[str, torch.Tensor],
        specific: Mapping[str, torch.Tensor],
        device: torch.device,
        layers: int | None = None,
        multiple: int = 1,
    ) -> GeneratorParameters:
        """The shared units followed by the layer's own, on `device`; differentiable.

        Args:
            shared: a generator's parameters, by the names here with s in place of k.
            specific: a layer's own, by their names there; with `layers`, those of L layers, stacked [L, ...].
            layers: L, which gives every matrix, but no bias, a leading dimension.
            multiple: zero units after them make the number of a matrix's units one of it.

        Raises:
            RuntimeError: the shared units are on the meta device, that is, offloaded.
        """
        if device.type != "meta" and any(tensor.device.type == "meta" for tensor in shared.values()):
            raise RuntimeError(
                "the generator is offloaded, and no call of it brings it back: keep genft_generators on a device "
                "(by an entry of its own in the device_map)"
            )

        def along_units(name: str) -> torch.Tensor | None:
            common = shared.get(name)
            common = None if common is None else common.to(device)
            if name.endswith("bias"):
                return common
            stage, end = name.split("_")
            own = specific.get(f"{stage}_specific_{end}", specific.get(f"specific_{end}"))
            if common is not None and layers is not None:
                common = common.expand(layers, *common.shape)
            parts, dim = [half for half in (common, own) if half is not None], -1 if end == "up" else -2
            if parts and (missing := -sum(part.shape[dim] for part in parts) % multiple):
                shape = list(parts[0].shape)
                shape[dim] = missing
                parts.append(parts[0].new_zeros(()).expand(shape))
            return torch.cat(parts, dim) if len(parts) > 1 else next(iter(parts), None)

        return cls(**{name: along_units(name) for name in cls._fields})


def as_group(params: GeneratorParameters) -> GeneratorParameters:
    """One layer's tensors as a group's: the matrices with a leading dimension, the biases without."""
    return GeneratorParameters(*(t if t is None or t.dim() == 1 else t[None] for t in params))


def of_block(params: GeneratorParameters, index: int) -> GeneratorParameters:
    """One block's tensors, of a group's."""
    return GeneratorParameters(*(t if t is None or t.dim() == 1 else t[index] for t in params))


def for_blocks(own: torch.Tensor, blocks: int) -> torch.Tensor:
    """A layer's own units for each of its blocks, [blocks, ...]: one matrix serves all, of [n, ...] each its share."""
    return own.expand(blocks, *own.shape) if own.dim() == 2 else own.repeat_interleave(blocks // own.shape[0], 0)


def expected_shapes(
    config: GenFTConfig, in_features: int, out_features: int, width: int
) -> dict[str, tuple[int, ...] | None]:
    """The shape of every tensor of `GeneratorParameters`, None for one that `config` does not have.

    `width` counts the hidden units of the matrices: k for a layer's concatenated tensors, s for the shared half.
    Down biases always have all k entries.
    """
    columns, rows = config.transform != "row", config.transform != "column"
    return {
        "column_down": (width, in_features) if columns else None,
        "column_up": (in_features, width) if columns else None,
        "row_down": (width, out_features) if rows else None,
        "row_up": (out_features, width) if rows else None,
        "column_down_bias": (config.hidden_dim,) if columns and config.bias else None,
        "column_up_bias": (in_features,) if columns and config.bias else None,
        "row_down_bias": (config.hidden_dim,) if rows and config.bias else None,
        "row_up_bias": (out_features,) if rows and config.bias else None,
    }


def shared_shapes(config: GenFTConfig, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a generator's own tensors, of those that it has."""
    shapes = expected_shapes(config, in_features, out_features, config.shared_dim)
    return {name: shape for name, shape in shapes.items() if shape is not None and 0 not in shape}


def specific_shapes(config: GenFTConfig, in_features: int, out_features: int) -> dict[str, tuple[int, int]]:
    """The shapes of the tensors that each layer has of its own."""
    r = config.specific_dim
    if r == 0:
        return {}
    if config.ties_specific(in_features, out_features):
        return {"specific_down": (r, in_features), "specific_up": (out_features, r)}
    shapes: dict[str, tuple[int, int]] = {}
    if config.transform != "row":
        shapes |= {"column_specific_down": (r, in_features), "column_specific_up": (in_features, r)}
    if config.transform != "column":
        shapes |= {"row_specific_down": (r, out_features), "row_specific_up": (out_features, r)}
    return shapes
