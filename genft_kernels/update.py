"""One layer's update, or those of a group: generated from frozen weights, and applied to tokens.

`generate_factors` is the weight side and does not depend on x; `apply_factors` is the token side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from . import _torch_private, ops
from .backends.names import KERNEL_BACKENDS
from .checks import compute_dtype, draw_seed, seed_tensor
from .config import GenFTConfig, is_factored
from .frozen_weight import FrozenWeight, dense_once
from .norm import norm_of
from .operation import Operation
from .parameters import GeneratorParameters
from .philox import COLUMN_STREAM, ROW_STREAM

Frozen = torch.Tensor | FrozenWeight  # W, or the handle of one that is stored quantised


class Factors(NamedTuple):
    """The thin factors of generated updates, dW = scale * drop(psi(b h^T)); scale, psi, p and seed are in `Action`."""

    h: torch.Tensor  # [L, in, k] of L layers, [in, k] of one; k + 1 with bias, then zero units (`with_zero_units`)
    b: torch.Tensor  # [L, out, k] or [out, k], likewise
    stream: int  # of the mask

    def unbind(self) -> list[Factors]:
        """The part of each of the L layers."""
        return [Factors(h, b, self.stream) for h, b in zip(self.h.unbind(0), self.b.unbind(0), strict=True)]


class Action(NamedTuple):
    """Scale, psi, dropout and seed, by which factors make an update."""

    scale: float
    activation: str  # psi
    dropout: float = 0.0  # in effect
    seed: torch.Tensor | None = None  # int64 [1]; None without dropout and where nothing rounds stochastically


def run_operation(operation: Operation, *args: Any) -> torch.Tensor:
    """The first result of an operation."""
    return operation(*args)


class Known(NamedTuple):
    """Parts that a generation need not compute, because somebody keeps them."""

    norms: torch.Tensor | None = None  # of the weights, [L]
    run: Callable[..., torch.Tensor] = run_operation  # takes the place of that one


NOTHING = Known()


def generate_factors(
    weights: Sequence[Frozen],
    params: GeneratorParameters,
    config: GenFTConfig,
    *,
    dtype: torch.dtype,
    dropout: float,
    seed: torch.Tensor | None,
    backend: str,
    known: Known = NOTHING,
) -> Factors:
    """The thin factors in `dtype` of L layers' updates, from frozen weights (docs/method.md#two-products, "generate").

    rho goes into thin matrices: rho * W A^T = W (rho * A)^T.

    Args:
        weights: L matrices [out, in] on one device.
        params: each matrix with a leading dimension L, the biases, which all layers share, without.
        seed: int64 [L], the layers' own, or None without dropout.
        backend: an operation backend by name.
        known: of an earlier generation from the same.
    """
    rho = weight_ratio(weights, config, known.norms)
    matrix_ratio = rho if config.ratio_scope == "all" else None
    device, phi, transform = weights[0].device, config.inner_activation, config.transform

    def units(stage: str, ratio: float | torch.Tensor | None) -> _Units:
        return _Units.of(params, stage, (ratio, matrix_ratio), device, dtype)

    stages = {"both": ("column",), "sum": ("column", "row")}.get(transform, (transform,))
    of_stages = [units(stage, rho) for stage in stages]
    matrices = [list(weights) if stage == "column" else [weight.t() for weight in weights] for stage in stages]
    hidden = _over_weights(list(zip(matrices, of_stages, strict=True)), phi, backend, known)
    # Of the column stage [L, out, k], [L, in, k]; of the row stage [L, in, k], [L, out, k].
    (left, right), *more = (each.joined(h, config.hidden_dim) for each, h in zip(of_stages, hidden, strict=True))
    if transform == "column":
        return Factors(right, left, COLUMN_STREAM)
    if transform == "row":
        return Factors(left, right, ROW_STREAM)
    if transform == "sum":
        ((h, b),) = more
        return Factors(torch.cat([right, h], 2), torch.cat([left, b], 2), ROW_STREAM)  # [L, in, 2 k], [L, out, 2 k]
    row, psi = units("row", matrix_ratio), config.outer_activation
    run = run_operation if is_factored(psi, dropout) else known.run  # thin products are not worth keeping
    h = run(ops.row_node, left, right, row.down, row.down_bias, seed, psi, dropout, phi, backend)  # [L, in, k]
    h, b = row.joined(h, config.hidden_dim)
    # dW = sigma * D instead of sigma * D^T: the factors change places.
    return Factors(b, h, ROW_STREAM) if config.delta_layout == "out_in" else Factors(h, b, ROW_STREAM)


def _over_weights(
    stages: list[tuple[list[Frozen], _Units]], phi: str, backend: str, known: Known
) -> list[torch.Tensor]:
    """The column op of W's, of their transposes, or of both, for all layers at once.

    Where W is quantised, one by one for kernels, so that one is dense, and for both, so that it is made dense once.
    """
    (weights, first), *others = stages
    at_once = backend not in KERNEL_BACKENDS and first.down.device.type == "cpu" and not others
    if at_once or not isinstance(weights[0], FrozenWeight):
        return [
            known.run(ops.column_node, matrices, of_stage.down, of_stage.down_bias, phi, backend)
            for matrices, of_stage in stages
        ]
    found: list[list[torch.Tensor]] = [[] for _ in stages]
    with dense_once():
        for layer in range(len(weights)):
            for results, (matrices, of_stage) in zip(found, stages, strict=True):
                one = [matrices[layer]], of_stage.down[layer : layer + 1], of_stage.down_bias
                results.append(known.run(ops.column_node, *one, phi, backend))
    return [torch.cat(results) for results in found]


def weight_ratio(weights: Sequence[Frozen], config: GenFTConfig, norms: torch.Tensor | None) -> float | torch.Tensor:
    """rho: the configured number, or 1 / root mean square of each W as a tensor [L, 1, 1] (no host sync)."""
    if not isinstance(config.weight_ratio, str):
        return config.weight_ratio
    norms = norms_of(weights) if norms is None else norms
    # From a W of zeros everything in proportion to it is zero, whatever rho is.
    return (weights[0].numel() ** 0.5 / torch.where(norms > 0, norms, 1))[:, None, None]


def norms_of(weights: Sequence[Frozen]) -> torch.Tensor:
    """The Frobenius norm of each W, [L], in float32 or wider."""
    dense = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    if len(dense) == len(weights) > 1 and dense[0].device.type != "cpu" and not torch.compiler.is_compiling():
        return torch.stack(_torch_private.norms(dense, torch.promote_types(dense[0].dtype, torch.float32)))
    return torch.stack([w.norm() if isinstance(w, FrozenWeight) else norm_of(w) for w in weights])


class _Units(NamedTuple):
    """The tensors of one stage as its products take them: scaled, cast, with zero units after the down matrix's own."""

    down: torch.Tensor  # [L, k, n]
    up: torch.Tensor  # [L, m, k]
    down_bias: torch.Tensor | None  # [k]
    up_bias: torch.Tensor | None  # [m]

    @classmethod
    def of(
        cls,
        params: GeneratorParameters,
        stage: str,
        ratios: tuple[float | torch.Tensor | None, float | torch.Tensor | None],
        device: torch.device,
        dtype: torch.dtype,
    ) -> _Units:
        """Down and up matrices of `stage`, times `ratios`, which comes before the cast that may round."""
        tensors = params._asdict()
        down, up = (tensors[f"{stage}_{end}"] for end in ("down", "up"))
        down, up = (
            (matrix if ratio is None else matrix * ratio).to(device, dtype)
            for matrix, ratio in zip((down, up), ratios, strict=True)
        )
        down_bias, up_bias = (
            None if bias is None else bias.to(device, dtype)
            for bias in (tensors[f"{stage}_{end}_bias"] for end in ("down", "up"))
        )
        return cls(
            with_zero_units(down, -2), up, None if down_bias is None else with_zero_units(down_bias, -1), up_bias
        )

    def joined(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden [L, n, k], up [L, m, k]). A bias is one more unit, always one: hidden | 1 and up | bias."""
        if self.up_bias is None:
            return hidden, with_zero_units(self.up, -1)
        ones, biases = hidden.new_ones((*hidden.shape[:2], 1)), self.up_bias[:, None].expand(*self.up.shape[:2], 1)
        pairs = ([hidden[..., :k], ones], [self.up[..., :k], biases])
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
    """The number of which thin matrices have a multiple as hidden units."""
    return 16 if device.type == "cuda" and dtype.itemsize == 2 else 1


def apply_factors(
    x: torch.Tensor,
    weight: Frozen,
    bias: torch.Tensor | None,
    factors: Factors,
    action: Action,
    backend: str,
    operation: Callable[..., torch.Tensor] = ops.linear_node,
) -> torch.Tensor:
    """The token side alone: `factored_linear` of arguments that were checked, the factors in `compute_dtype(x)`."""
    dtype = compute_dtype(x)
    # `.to` also unwraps what torch.func left wrapped, which the plain node would not.
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    h, b, stream = factors
    scale, psi, dropout, seed = action
    return operation(x, weight, bias, h, b, seed, float(scale), psi, dropout, stream, backend)


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
