"""The functional interface: one layer's update generated and applied, on a chosen backend.

`generate_factors` is the weight side of design section 2 and does not depend on x; `factored_linear` is the token
side. `genft_linear` is both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import backends, ops, reference
from .activations import ACTIVATIONS
from .checks import (
    autocasts,
    check_factors,
    check_linear,
    check_parameters,
    check_transforms,
    draw_seed,
    seed_tensor,
)
from .config import GeneratorParameters, GenFTConfig, is_factored, is_finite
from .philox import COLUMN_STREAM, ROW_STREAM

__all__ = ["Factors", "factored_linear", "generate_factors", "genft_linear"]


class Factors(NamedTuple):
    """What is left of generated updates: dW = scale * drop(psi(b h^T)), mask drawn from `stream`."""

    h: torch.Tensor  # [L, in, k] for L layers or [in, k] for one; one more column with bias
    b: torch.Tensor  # [L, out, k] or [out, k], likewise
    stream: int

    def unbind(self) -> list[Factors]:
        """Those of each of the L layers."""
        return [Factors(h, b, self.stream) for h, b in zip(self.h.unbind(0), self.b.unbind(0), strict=True)]


def genft_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    params: GeneratorParameters,
    config: GenFTConfig,
    *,
    training: bool = False,
    seed: int | torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """A frozen linear layer with its generated update: y = x (W + dW)^T + bias (design section 1).

    Args:
        x: [..., in], any leading shape, zero tokens included, any strides.
        weight: the frozen W [out, in], any strides.
        bias: [out] or None.
        params: the layer's tensors; cast to x's dtype and device, gradients come back in their own.
        config: the method's settings; `params` must fit it.
        training: whether dropout is active.
        seed: 64-bit seed of the dropout masks and of stochastic rounding; None draws one, in training and where it
            is needed, from the default generator of x's device.
        backend: "auto", or one by name (`genft_kernels.backends`).

    Returns:
        y [..., out] in x's dtype, or in autocast's.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run on x's device.
        NotImplementedError: forward-mode differentiation or a `torch.func` transform, on another backend than
            "reference".
    """
    check_linear(x, weight, bias)
    check_parameters(params, config, *weight.shape)
    dtype = compute_dtype(x)
    chosen = backends.choose(backend, x.device, dtype)
    if chosen == "reference":
        return reference.genft_linear(x, weight, bias, params, config, training=training, seed=seed)
    check_transforms(chosen)
    dropout = config.dropout if training else 0.0
    seed = forward_seed(seed, x.device, training, dropout, config.outer_activation, dtype, chosen)
    group = GeneratorParameters(*(t if t is None or t.dim() == 1 else t[None] for t in params))
    generated = generate_factors([weight], group, config, dtype=dtype, dropout=dropout, seed=seed, backend=chosen)
    (factors,) = generated.unbind()
    return apply_factors(x, weight, bias, factors, config.scaling, config.outer_activation, dropout, seed, chosen)[0]


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
    backend: str = "auto",
) -> torch.Tensor:
    """A frozen linear layer with a factored update: y = x (W + scale * drop(psi(b h^T)))^T + bias.

    With `activation="identity"` and no dropout it is LoRA with h = A^T, b = B (design section 2).

    Args:
        h: [in, k]; b: [out, k]; cast to x's dtype, gradients come back in their own.
        activation: psi, one of identity, relu, leaky_relu, gelu, silu, tanh.
        dropout: p in [0, 1), on the elements of the update, active only with `training=True`.
        x, weight, bias, seed, backend: as in `genft_linear`; returns and raises as there.
    """
    check_linear(x, weight, bias)
    check_factors(h, b, weight)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if not is_finite(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}")
    if not is_finite(scale):  # a tensor's gradient would get lost
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    chosen = backends.choose(backend, x.device, compute_dtype(x))
    if chosen == "reference":
        return reference.factored_linear(
            x, weight, bias, h, b, scale=scale, activation=activation, dropout=dropout, training=training, seed=seed
        )
    check_transforms(chosen)
    dtype = compute_dtype(x)
    dropout = dropout if training else 0.0
    seed = forward_seed(seed, x.device, training, dropout, activation, dtype, chosen)
    factors = Factors(h.to(x.device, dtype), b.to(x.device, dtype), ROW_STREAM)
    return apply_factors(x, weight, bias, factors, scale, activation, dropout, seed, chosen)[0]


def generate_factors(
    weights: Sequence[torch.Tensor],
    params: GeneratorParameters,
    config: GenFTConfig,
    *,
    dtype: torch.dtype,
    dropout: float,
    seed: torch.Tensor | None,
    backend: str,
) -> Factors:
    """The thin factors in `dtype` of L layers' updates, from their frozen weights (design section 2, "generate").

    rho goes into thin matrices: rho * W A^T = W (rho * A)^T.

    Args:
        weights: L matrices [out, in] on one device.
        params: each matrix with a leading dimension L, the biases, which all layers share, without.
        seed: int64 [L], the layers' own, or None without dropout.
        backend: an operation backend by name.
    """
    rho = _weight_ratio(weights, config)
    matrix_ratio = rho if config.ratio_scope == "all" else None
    device, phi = weights[0].device, config.inner_activation

    def cast(tensor: torch.Tensor | None, ratio: float | torch.Tensor | None = None) -> torch.Tensor | None:
        # Scaled before the cast, which may round.
        return None if tensor is None else (tensor if ratio is None else tensor * ratio).to(device, dtype)

    row_up, row_up_bias = cast(params.row_up, matrix_ratio), cast(params.row_up_bias)
    row_down_bias = cast(params.row_down_bias)
    if config.transform == "row":
        transposed = [weight.t() for weight in weights]
        h, _ = ops.column(transposed, cast(params.row_down, rho), row_down_bias, phi, backend)  # [L, in, k]
        return Factors(*_with_bias_unit(h, row_up, row_up_bias), ROW_STREAM)
    column_down, column_down_bias = cast(params.column_down, rho), cast(params.column_down_bias)
    h1, _ = ops.column(list(weights), column_down, column_down_bias, phi, backend)  # [L, out, k]
    left, right = _with_bias_unit(h1, cast(params.column_up, matrix_ratio), cast(params.column_up_bias))
    if config.transform == "column":
        return Factors(right, left, COLUMN_STREAM)
    row_down = cast(params.row_down, matrix_ratio)
    h, _ = ops.row(
        left, right, row_down, row_down_bias, seed, config.outer_activation, dropout, phi, backend
    )  # [L, in, k]
    h, b = _with_bias_unit(h, row_up, row_up_bias)
    # dW = sigma * D instead of sigma * D^T: the factors change places.
    return Factors(b, h, ROW_STREAM) if config.delta_layout == "out_in" else Factors(h, b, ROW_STREAM)


def _with_bias_unit(
    hidden: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A bias is one more hidden unit that is always one: hidden [L, n, k] | 1 and up [L, m, k] | bias [m]."""
    if bias is None:
        return hidden, up
    ones, biases = hidden.new_ones((*hidden.shape[:2], 1)), bias[:, None].expand(*up.shape[:2], 1)
    return torch.cat([hidden, ones], 2), torch.cat([up, biases], 2)


def apply_factors(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Factors,
    scale: float,
    activation: str,
    dropout: float,
    seed: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The token side alone: `factored_linear` of arguments that were checked, the factors in `compute_dtype(x)`.

    Returns y and what the next reader of x should read in its place (`ops.linear_handing_on`).
    """
    dtype = compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    h, b, stream = factors
    return ops.linear_handing_on(
        x.to(dtype), weight, bias, h, b, seed, float(scale), activation, dropout, stream, backend
    )


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What a layer computes in: x's dtype, or autocast's."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def _weight_ratio(weights: Sequence[torch.Tensor], config: GenFTConfig) -> float | torch.Tensor:
    """rho: the configured number, or 1 / root mean square of each W as a tensor [L, 1, 1] (no host sync)."""
    if config.weight_ratio != "rms":
        return config.weight_ratio
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    norms = torch.stack([torch.linalg.vector_norm(weight, dtype=wide) for weight in weights])
    # From a W of zeros everything in proportion to it is zero, whatever rho is.
    return (weights[0].numel() ** 0.5 / torch.where(norms > 0, norms, 1))[:, None, None]


def forward_seed(
    seed: int | torch.Tensor | None,
    device: torch.device,
    training: bool,
    dropout: float,
    outer_activation: str,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor | None:
    """A layer's seed as a tensor, drawn where none is given but dropout or stochastic rounding will want one.

    Outside training no seed is drawn: rounding then takes a fixed one, so that evaluation is repeatable.
    """
    if seed is not None:
        return seed_tensor(seed, device)
    # What is folded is rounded; in the factored form only kernels ever fold.
    folds = backend != "eager" or not is_factored(outer_activation, dropout)
    rounds = folds and dtype.itemsize == 2
    return draw_seed(device) if training and (dropout > 0 or rounds) else None
