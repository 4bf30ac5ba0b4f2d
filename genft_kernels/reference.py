"""The specification: GenFT exactly as docs/method.md#the-method writes it, materialising every matrix.

Everything else in the package is checked against this module. It takes any floating dtype and computes in the
weight's; gradients come from autograd. It is slow and large on purpose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .activations import activate
from .arguments import check_flag
from .checks import (
    check_factors,
    check_frozen_weight,
    check_linear,
    check_options,
    check_parameters,
    draw_seed,
    seed_tensor,
)
from .config import GenFTConfig
from .parameters import GeneratorParameters
from .philox import COLUMN_STREAM, ROW_STREAM, keep_mask


def delta_weight(
    weight: torch.Tensor,
    params: GeneratorParameters,
    config: GenFTConfig,
    *,
    training: bool = False,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """The update dW [out, in] that the generator makes from the frozen `weight` [out, in] (docs/method.md#the-method).

    Args:
        params: the layer's concatenated tensors; they are cast to the weight's dtype and device.
        training: whether dropout is active.
        seed: the 64-bit seed of the dropout masks; None draws one from the default generator of the device.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names the tensor.
    """
    check_frozen_weight(weight)
    out_features, in_features = weight.shape
    check_parameters(params, config, out_features, in_features)
    check_flag("training", training)
    p = GeneratorParameters(*(None if t is None else t.to(weight) for t in params))
    phi, psi = config.inner_activation, config.outer_activation
    rho = _inverse_rms(weight) if config.weight_ratio == "rms" else float(config.weight_ratio)
    scaled_weight = weight * rho if config.ratio_scope == "weight" else weight  # [out, in]
    ratio = rho if config.ratio_scope == "all" else 1.0
    masks = _dropout_masks(weight, config, training, seed)

    column = p.column_down, p.column_down_bias, p.column_up, p.column_up_bias
    row = p.row_down, p.row_down_bias, p.row_up, p.row_up_bias
    if config.transform == "sum":
        c = _bottleneck(scaled_weight, ratio, phi, *column)  # [out, in]
        d = _bottleneck(scaled_weight.T, ratio, phi, *row)  # [in, out]
        return config.scaling * (activate(psi, c + d.T) * masks[ROW_STREAM])
    if config.transform != "row":
        y1 = activate(psi, _bottleneck(scaled_weight, ratio, phi, *column)) * masks[COLUMN_STREAM]  # [out, in]
        if config.transform == "column":
            return config.scaling * y1
    row_input = scaled_weight.T if config.transform == "row" else y1.T  # [in, out]
    d = _bottleneck(row_input, ratio, phi, *row)  # [in, out]
    # The mask belongs to the element of dW, so it is applied once D stands in the weight's orientation.
    d = activate(psi, d if config.delta_layout == "out_in" else d.T)  # [out, in]
    return config.scaling * (d * masks[ROW_STREAM])


def genft_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    params: GeneratorParameters,
    config: GenFTConfig,
    *,
    training: bool = False,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """y [..., out] = x (W + dW)^T + bias, with dW from `delta_weight`; arguments and errors as there."""
    check_linear(x, weight, bias)
    return F.linear(x, weight + delta_weight(weight, params, config, training=training, seed=seed), bias)


def factored_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    h: torch.Tensor,
    b: torch.Tensor,
    *,
    scale: float = 1.0,
    activation: str = "identity",
    dropout: float = 0.0,
    training: bool = False,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """y [..., out] = x (W + scale * drop(psi(h b^T))^T)^T + bias (docs/method.md#two-products).

    x is [..., in], weight [out, in], h [in, k], b [out, k]; errors of `functional.factored_linear`.
    """
    check_linear(x, weight, bias)
    check_factors(h, b, weight)
    check_options(scale=scale, activation=activation, dropout=dropout, training=training)
    update = _factored_update(weight, h, b, activation, ROW_STREAM, dropout if training else 0.0, seed)
    return F.linear(x, weight + scale * update, bias)


def _factored_update(
    weight: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    activation: str,
    stream: int,
    dropout: float,
    seed: int | torch.Tensor | None,
) -> torch.Tensor:
    """drop(psi(b h^T))  [out, in], in the weight's dtype."""
    return activate(activation, b.to(weight) @ h.to(weight).T) * _mask(weight, stream, dropout, seed)


def _bottleneck(
    rows: torch.Tensor,  # [m, n]
    ratio: torch.Tensor | float,
    activation: str,
    down: torch.Tensor | None,  # [k, n]
    down_bias: torch.Tensor | None,  # [k]
    up: torch.Tensor | None,  # [n, k]
    up_bias: torch.Tensor | None,  # [n]
) -> torch.Tensor:
    """A stage up to its outer activation: inner(ratio * rows down^T + down_bias) (ratio * up)^T + up_bias, [m, n]."""
    assert down is not None and up is not None  # the configuration has this stage
    z = rows @ (ratio * down).T  # [m, k]
    z = z if down_bias is None else z + down_bias
    y = activate(activation, z) @ (ratio * up).T  # [m, n]
    return y if up_bias is None else y + up_bias


def _inverse_rms(weight: torch.Tensor) -> torch.Tensor:
    """1 / root mean square; 1 for a weight of zeros, which it scales to zeros all the same."""
    rms = weight.square().mean().sqrt()
    return 1 / torch.where(rms > 0, rms, 1)


def _dropout_masks(
    weight: torch.Tensor, config: GenFTConfig, training: bool, seed: int | torch.Tensor | None
) -> dict[int, torch.Tensor | float]:
    """By stream, 0 or 1 / (1 - p) for every element of an update [out, in]; 1.0 where dropout is off."""
    dropout = config.dropout if training else 0.0
    if dropout > 0 and seed is None:
        seed = draw_seed(weight.device)  # one for both stages
    return {stream: _mask(weight, stream, dropout, seed) for stream in (COLUMN_STREAM, ROW_STREAM)}


def _mask(weight: torch.Tensor, stream: int, dropout: float, seed: int | torch.Tensor | None) -> torch.Tensor | float:
    if dropout == 0:
        return 1.0
    seed = draw_seed(weight.device) if seed is None else seed_tensor(seed, weight.device)
    out_features, in_features = weight.shape
    return keep_mask(seed, stream, in_features, out_features, dropout).to(weight.dtype) / (1 - dropout)
