"""The specification: GenFT exactly as docs/method.md#the-method writes it, materialising every matrix.

Everything else in the package is checked against this module. It takes any floating dtype and computes in the
weight's; gradients come from autograd. It is slow and large on purpose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .activations import activate
from .checks import check_factors, check_frozen_weight, check_linear, check_parameters, draw_seed, seed_tensor
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
    p = GeneratorParameters(*(None if t is None else t.to(weight) for t in params))
    phi, psi = config.inner_activation, config.outer_activation
    rho = _inverse_rms(weight) if config.weight_ratio == "rms" else config.weight_ratio
    scaled_weight = weight * rho if config.ratio_scope == "weight" else weight  # [out, in]
    matrix_ratio = rho if config.ratio_scope == "all" else 1.0
    masks = _dropout_masks(weight, config, training, seed)

    if config.transform != "row":
        z1 = scaled_weight @ (matrix_ratio * p.column_down).T  # [out, k]
        z1 = z1 if p.column_down_bias is None else z1 + p.column_down_bias
        y1 = activate(phi, z1) @ (matrix_ratio * p.column_up).T  # [out, in]
        y1 = y1 if p.column_up_bias is None else y1 + p.column_up_bias
        y1 = activate(psi, y1) * masks[COLUMN_STREAM]
        if config.transform == "column":
            return config.scaling * y1
    row_input = scaled_weight.T if config.transform == "row" else y1.T  # [in, out]
    z2 = row_input @ (matrix_ratio * p.row_down).T  # [in, k]
    z2 = z2 if p.row_down_bias is None else z2 + p.row_down_bias
    d = activate(phi, z2) @ (matrix_ratio * p.row_up).T  # [in, out]
    d = d if p.row_up_bias is None else d + p.row_up_bias
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

    h is [in, k], b [out, k].
    """
    check_linear(x, weight, bias)
    check_factors(h, b, weight)
    update = activate(activation, b.to(weight) @ h.to(weight).T)  # [out, in]
    update = update * _mask(weight, ROW_STREAM, dropout if training else 0.0, seed)
    return F.linear(x, weight + scale * update, bias)


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
