"""One layer's update, or those of a group: generated from frozen weights, and applied to tokens.

`generate_factors` is the weight side and does not depend on x; `apply_factors` is the token side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import ops
from .backends import KERNEL_BACKENDS
from .checks import autocasts, draw_seed, seed_tensor
from .config import GenFTConfig, is_factored
from .frozen_weight import FrozenWeight
from .parameters import GeneratorParameters
from .philox import COLUMN_STREAM, ROW_STREAM

Frozen = torch.Tensor | FrozenWeight  # W, or the handle of one that is stored quantised


class Factors(NamedTuple):
    """What is left of generated updates: dW = scale * drop(psi(b h^T)), mask drawn from `stream`."""

    h: torch.Tensor  # [L, in, k] for L layers or [in, k] for one; one more unit with bias, perhaps zero units after all
    b: torch.Tensor  # [L, out, k] or [out, k], likewise
    stream: int

    def unbind(self) -> list[Factors]:
        """Those of each of the L layers."""
        return [Factors(h, b, self.stream) for h, b in zip(self.h.unbind(0), self.b.unbind(0), strict=True)]


def generate_factors(
    weights: Sequence[Frozen],
    params: GeneratorParameters,
    config: GenFTConfig,
    *,
    dtype: torch.dtype,
    dropout: float,
    seed: torch.Tensor | None,
    backend: str,
) -> Factors:
    """The thin factors in `dtype` of L layers' updates, from frozen weights (docs/method.md#two-products, "generate").

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

    def down(matrix: torch.Tensor, ratio: float | torch.Tensor | None) -> torch.Tensor:
        return with_zero_units(cast(matrix, ratio), -2)

    def down_bias(bias: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias is None else with_zero_units(cast(bias), -1)

    def with_bias_unit(hidden: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None):
        return _with_bias_unit(hidden, cast(up, matrix_ratio), cast(bias), config.hidden_dim)

    row_down_bias = down_bias(params.row_down_bias)
    if config.transform == "row":
        transposed = [weight.t() for weight in weights]
        h = _column(transposed, down(params.row_down, rho), row_down_bias, phi, backend)  # [L, in, k]
        return Factors(*with_bias_unit(h, params.row_up, params.row_up_bias), ROW_STREAM)
    column_down, column_down_bias = down(params.column_down, rho), down_bias(params.column_down_bias)
    h1 = _column(list(weights), column_down, column_down_bias, phi, backend)  # [L, out, k]
    left, right = with_bias_unit(h1, params.column_up, params.column_up_bias)
    if config.transform == "column":
        return Factors(right, left, COLUMN_STREAM)
    row_down = down(params.row_down, matrix_ratio)
    h = ops.row_node(
        left, right, row_down, row_down_bias, seed, config.outer_activation, dropout, phi, backend
    )  # [L, in, k]
    h, b = with_bias_unit(h, params.row_up, params.row_up_bias)
    # dW = sigma * D instead of sigma * D^T: the factors change places.
    return Factors(b, h, ROW_STREAM) if config.delta_layout == "out_in" else Factors(h, b, ROW_STREAM)


def _column(
    weights: Sequence[Frozen], down: torch.Tensor, bias: torch.Tensor | None, phi: str, backend: str
) -> torch.Tensor:
    """The column op for all layers at once; for kernels one by one where W is quantised, so that one is dense."""
    at_once = backend not in KERNEL_BACKENDS and down.device.type == "cpu"
    if at_once or not isinstance(weights[0], FrozenWeight):
        return ops.column_node(list(weights), down, bias, phi, backend)
    each = zip(weights, down.split(1), strict=True)
    return torch.cat([ops.column_node([weight], one, bias, phi, backend) for weight, one in each])


def _weight_ratio(weights: Sequence[Frozen], config: GenFTConfig) -> float | torch.Tensor:
    """rho: the configured number, or 1 / root mean square of each W as a tensor [L, 1, 1] (no host sync)."""
    if config.weight_ratio != "rms":
        return config.weight_ratio
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    norms = torch.stack(
        [
            weight.norm() if isinstance(weight, FrozenWeight) else torch.linalg.vector_norm(weight, dtype=wide)
            for weight in weights
        ]
    )
    # From a W of zeros everything in proportion to it is zero, whatever rho is.
    return (weights[0].numel() ** 0.5 / torch.where(norms > 0, norms, 1))[:, None, None]


def _with_bias_unit(
    hidden: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A bias is one more hidden unit that is always one: hidden [L, n, k] | 1 and up [L, m, k] | bias [m]."""
    if bias is None:
        return hidden, with_zero_units(up, -1)
    ones, biases = hidden.new_ones((*hidden.shape[:2], 1)), bias[:, None].expand(*up.shape[:2], 1)
    pairs = ([hidden[..., :k], ones], [up[..., :k], biases])
    hidden, up = (with_zero_units(torch.cat(pair, 2), -1) for pair in pairs)
    return hidden, up


def with_zero_units(thin: torch.Tensor, dim: int) -> torch.Tensor:
    """`thin` with as many zero units after its own as its device likes, along `dim`; differentiable.

    They stay zero through every activation and change nothing. In 16 bits on a GPU a multiple of 16 halves the time of
    thin products, because every row then begins where an asynchronous load may (docs/backends.md#measured).
    """
    missing = -thin.shape[dim] % unit_multiple(thin.device, thin.dtype)
    if missing == 0:
        return thin
    return F.pad(thin, (0, missing) if dim == -1 else (0, 0, 0, missing))


def unit_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """What the number of hidden units of thin matrices is made a multiple of."""
    return 16 if device.type == "cuda" and dtype.itemsize == 2 else 1


def apply_factors(
    x: torch.Tensor,
    weight: Frozen,
    bias: torch.Tensor | None,
    factors: Factors,
    scale: float,
    activation: str,
    dropout: float,
    seed: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """The token side alone: `factored_linear` of arguments that were checked, the factors in `compute_dtype(x)`."""
    dtype = compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    h, b, stream = factors
    return ops.linear_node(x.to(dtype), weight, bias, h, b, seed, float(scale), activation, dropout, stream, backend)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What a layer computes in: x's dtype, or autocast's."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def forward_seed(
    seed: int | torch.Tensor | None,
    device: torch.device,
    training: bool,
    dropout: float,
    outer_activation: str,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """A layer's seed as a tensor, drawn where none is given but dropout or stochastic rounding will want one.

    Outside training no seed is drawn: rounding then takes a fixed one, so that evaluation is repeatable.
    """
    if seed is not None:
        return seed_tensor(seed, device)
    rounds = dtype.itemsize == 2 and not is_factored(outer_activation, dropout)
    return draw_seed(device) if training and (dropout > 0 or rounds) else None
