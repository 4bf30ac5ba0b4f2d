"""The plan between the operations and the kernels of Triton and CUDA, once for both.

A backend's launchers only write. Here their arguments are checked, memory for results is made, long sums are split, and
parts are added up in a fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import activation_backward
from ..config import is_factored
from ..philox import COLUMN_STREAM
from .eager import operations as eager
from .launchers import Launchers, Outcome, Sum, Update
from .names import KERNEL_DTYPES

Thin = TypeVar("Thin", Tensor, Update)

_EDGE = 64  # of a tile, in whose multiples long sums are split


class Kernels:
    """The kernels of a backend as functions of tensors."""

    def __init__(self, launchers: Launchers):
        self._launchers = launchers

    def thin_product(
        self, matrices: list[Tensor], thin: Tensor, bias: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor | None]:
        """(activation(matrix [m, n] thin[k, n]^T + bias [k]), its argument or None), both [L, m, k] in thin's dtype.

        `matrices` are L of one shape; `thin` is [L, k, n].
        """
        (m, n), layers, k = matrices[0].shape, len(matrices), thin.shape[1]
        _check_dtype(thin, bias)
        _check_shapes(thin=(thin, (layers, k, n)), bias=(bias, (k,)), **_of_one_shape(matrices))
        outcome = _outcome(thin.new_empty((layers, m, k)), bias, activation)
        columns, parts = _split(n, _tiles(m) * _tiles(k) * layers, 2 * _multiprocessors(thin.device), 256)
        target = outcome if parts == 1 else Outcome(_parts(thin, parts, layers, m, k))
        self._launchers.thin_product(matrices, _dense(thin), target, columns)
        if parts > 1:
            self._launchers.sum_parts(Sum(target.out, outcome))
        return outcome.out, outcome.pre

    def thin_transposed(self, dz: Tensor, matrices: list[Tensor]) -> Tensor:
        """dz [L, m, k]^T matrix [m, n]: [L, k, n] in dz's dtype, summed in a fixed order."""
        (m, n), layers, k = matrices[0].shape, len(matrices), dz.shape[2]
        _check_dtype(dz)
        _check_shapes(dz=(dz, (layers, m, k)), **_of_one_shape(matrices))
        rows, parts = _split(m, _tiles(n) * _tiles(k) * layers, 2 * _multiprocessors(dz.device), 256)
        out = dz.new_empty((layers, k, n))
        target = out if parts == 1 else _parts(dz, parts, layers, k, n)
        self._launchers.thin_transposed(_dense(dz), matrices, target, rows)
        if parts > 1:
            self._launchers.sum_parts(Sum(target, Outcome(out)))
        return out

    def row_forward(self, y: Update, down: Tensor, bias: Tensor | None, inner: str) -> tuple[Tensor, Tensor | None]:
        """(h [L, in, k], what the inner activation was applied to or None)."""
        k = down.shape[1]
        _check_row(y, down, bias=(bias, (k,)))
        outcome = _outcome(down.new_empty((*y.right.shape[:2], k)), bias, inner)
        self._launchers.row_forward(_dense(y), _dense(down), outcome)
        return outcome.out, outcome.pre

    def row_backward(
        self, grad: Tensor, y: Update, down: Tensor, pre: Tensor | None, inner: str, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """(dleft [L, out, k1], dright [L, in, k1], dA [L, k, out], da [k]), those that `needs` names."""
        *need_matrices, need_bias = needs
        shape = *y.right.shape[:2], down.shape[1]
        pre = pre if inner != "identity" else None
        _check_row(y, down, grad=(grad, shape), pre=(pre, shape))
        dz = activation_backward(inner, grad, pre)  # [L, in, k]
        y, down = _dense(y), _dense(down)
        given = zip((y.left, y.right, down), need_matrices, strict=True)
        grads = [torch.empty_like(each) if need else None for each, need in given]
        if any(need_matrices):
            self._launchers.row_backward(y, down, _dense(dz), *grads)
        return *grads, dz.sum((0, 1)) if need_bias else None

    def fold(self, weight: Tensor, update: Update, scale: float) -> Tensor:
        """W + scale * U  [out, in] in the factors' dtype; it lies in memory as W does."""
        (n_out, n_in), k = weight.shape, update.right.shape[1]
        _check_update(update, n_out, n_in, k)
        transposed = weight.stride(0) == 1 and weight.stride(1) > 1
        new = update.right.new_empty
        out = new((n_in, n_out)).t() if transposed else new((n_out, n_in))
        self._launchers.fold(weight, _dense(update), scale, out)
        return out

    def contract(
        self, dy: Tensor, x: Tensor, update: Update, scale: float, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dh [in, k], db [out, k]) in the factors' dtype, those that `needs` names."""
        (t, n_out), (n_in, k) = dy.shape, update.right.shape
        _check_dtype(dy, x)
        _check_update(update, n_out, n_in, k, x=(x, (t, n_in)))
        edges = self._launchers.tile_of_contract(dy, k, update.activation, update.dropout)
        out_tiles, in_tiles = (-(-n // edge) for n, edge in zip((n_out, n_in), edges, strict=True))
        # P is linear in G, and so in the tokens.
        tokens, parts = _split(t, out_tiles * in_tiles, _multiprocessors(dy.device), 512, most=4)
        shapes = (parts * out_tiles, n_in, k), (parts * in_tiles, n_out, k)
        dh, db = (
            Sum(_parts(dy, *shape), Outcome(update.right.new_empty(shape[1:]))) if need else None
            for shape, need in zip(shapes, needs, strict=True)
        )
        targets = None if dh is None else dh.parts, None if db is None else db.parts
        self._launchers.contract(dy, x, _dense(update), scale, targets, tokens)
        self._launchers.sum_parts(*(each for each in (dh, db) if each is not None))
        return None if dh is None else dh.outcome.out, None if db is None else db.outcome.out


class KernelOperations:
    """`column`, `row`, `linear` and their `_backward`s, by kernels where they beat PyTorch's own."""

    def __init__(self, kernels: Kernels):
        self._kernels = kernels

    def column(
        self, weights: list[Tensor], down: Tensor, bias: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor | None]:
        """h = phi(W A^T + a)  [L, out, k]."""
        return self._kernels.thin_product(weights, down, bias, activation)

    def column_backward(
        self, grad: Tensor, weights: list[Tensor], pre: Tensor | None, activation: str, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """dA = dZ^T W  [L, k, in], da = sum of dZ  [k]."""
        need_down, need_bias = needs
        dz = activation_backward(activation, grad, pre)  # [L, out, k]
        ddown = self._kernels.thin_transposed(dz, weights) if need_down else None
        return ddown, dz.sum((0, 1)) if need_bias else None

    def row(
        self, left: Tensor, right: Tensor, down: Tensor, bias: Tensor | None, seed: Tensor | None, outer: str,
        dropout: float, inner: str,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """h = phi(Y^T A^T + a)  [L, in, k]; factored, only k x k and thin products are left, which PyTorch does."""
        if is_factored(outer, dropout):
            return eager.row(left, right, down, bias, seed, outer, dropout, inner)
        return self._kernels.row_forward(Update(left, right, outer, dropout, seed, COLUMN_STREAM), down, bias, inner)

    def row_backward(
        self, grad: Tensor, left: Tensor, right: Tensor, down: Tensor, pre: Tensor | None, seed: Tensor | None,
        outer: str, dropout: float, inner: str, needs: list[bool],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """(dleft [L, out, k1], dright [L, in, k1], dA [L, k, out], da [k])."""
        if is_factored(outer, dropout):
            return eager.row_backward(grad, left, right, down, pre, seed, outer, dropout, inner, needs)
        y = Update(left, right, outer, dropout, seed, COLUMN_STREAM)
        return self._kernels.row_backward(grad, y, down, pre, inner, needs)

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, seed: Tensor | None, scale: float,
        activation: str, dropout: float, stream: int,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(y = x (W + scale * drop(psi(b h^T)))^T + bias  [..., out], scale * x h  [tokens, k], factored).

        Factored, a vendor's products do it all. Tiled, the update is folded into W for one.
        """
        if is_factored(activation, dropout):
            return eager.linear(x, weight, bias, h, b, seed, scale, activation, dropout, stream)
        update = Update(b, h, activation, dropout, seed, stream)
        return F.linear(x, self._kernels.fold(weight, update, scale), bias), None

    def linear_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, h: Tensor, b: Tensor, xh: Tensor | None, seed: Tensor | None,
        scale: float, activation: str, dropout: float, stream: int, needs: list[bool],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """(dx [..., in], dbias [out], dh [in, k], db [out, k])."""
        if is_factored(activation, dropout):
            return eager.linear_backward(grad, x, weight, h, b, xh, seed, scale, activation, dropout, stream, needs)
        need_x, need_bias, *need_factors = needs
        update = Update(b, h, activation, dropout, seed, stream)
        dy = grad.reshape(-1, grad.shape[-1])  # [T, out]
        dx = dh = db = None
        if any(need_factors):
            dh, db = self._kernels.contract(dy, x.reshape(-1, x.shape[-1]), update, scale, need_factors)
        if need_x:
            dx = grad @ self._kernels.fold(weight, update, scale)
        return dx, dy.sum(0) if need_bias else None, dh, db


# --- sizes ----------------------------------------------------------------------------------------------------------


def _tiles(n: int) -> int:
    return -(-n // _EDGE)


@functools.lru_cache(1024)
def _split(length: int, programs: int, at_once: int, shortest: int, most: int = 16) -> tuple[int, int]:
    """(elements of a part, a multiple of `_EDGE`; parts) of a sum over `length` elements that `programs` programs make.

    Where they leave multiprocessors of a card that runs `at_once` of them idle, each sum is cut so that the rounds, and
    the length of one, take the least. A part has `shortest` elements at least.
    """
    candidates = range(1, max(1, min(most, length // shortest)) + 1) if programs < at_once else [1]
    parts = min(candidates, key=lambda parts: -(-parts * programs // at_once) / parts)  # the first of equals
    each = max(1, _tiles(-(-length // parts))) * _EDGE
    return each, max(1, -(-length // each))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Of a card; where there is none (compiling ahead of time, tests), an H100's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


# --- memory ---------------------------------------------------------------------------------------------------------


def _outcome(out: Tensor, bias: Tensor | None, activation: str) -> Outcome:
    pre = None if activation == "identity" else torch.empty_like(out)
    return Outcome(out, None if bias is None else _dense(bias), activation, pre)


def _parts(like: Tensor, parts: int, *shape: int) -> Tensor:
    return torch.empty((parts, *shape), dtype=torch.float32, device=like.device)


def _dense(thin: Thin) -> Thin:
    """A thin tensor, or an update's, contiguous, as the ops do not promise it and launchers want it.

    Of the package's own only one is not: the gradient of a stage that has no activation and beside its units a one, for
    the bias of the next product, or the units of another stage. It is made in one piece with the gradient of these.
    """
    if isinstance(thin, Tensor):
        return thin.contiguous()
    seed = None if thin.seed is None else _dense(thin.seed)
    return thin._replace(left=_dense(thin.left), right=_dense(thin.right), seed=seed)


# --- checks ---------------------------------------------------------------------------------------------------------

Expected = tuple[Tensor | None, tuple[int, ...]]


def _check_row(y: Update, down: Tensor, **more: Expected) -> None:
    (layers, n_out, k1), n_in, k = y.left.shape, y.right.shape[1], down.shape[1]
    _check_dtype(y.left, y.right, down, *(tensor for tensor, _ in more.values()))
    _check_shapes(right=(y.right, (layers, n_in, k1)), down=(down, (layers, k, n_out)), **more)
    _check_seed(y.seed, layers)


def _check_update(update: Update, n_out: int, n_in: int, k: int, **more: Expected) -> None:
    _check_dtype(update.left, update.right)
    _check_shapes(h=(update.right, (n_in, k)), b=(update.left, (n_out, k)), **more)
    _check_seed(update.seed, 1)


def _check_dtype(*tensors: Tensor | None) -> None:
    """TypeError unless the given tensors share a dtype that kernels compute in."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(dtypes) > 1:
        raise TypeError(f"the factors of a kernel must be of one dtype, not of {_listed(dtypes)}")
    if not dtypes.issubset(KERNEL_DTYPES):
        raise TypeError(f"the kernels compute in {_listed(KERNEL_DTYPES)}, not in {dtypes.pop()}")


def _check_shapes(**expected: Expected) -> None:
    """ValueError that names the tensor whose shape is not the expected one; the kernels would read beside it."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")


def _check_seed(seed: Tensor | None, layers: int) -> None:
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != layers):
        raise ValueError(f"seed must be int64 with {layers} elements, got {seed.dtype} with {seed.numel()}")


def _of_one_shape(matrices: list[Tensor]) -> dict[str, Expected]:
    return {f"matrix {index}": (matrix, tuple(matrices[0].shape)) for index, matrix in enumerate(matrices)}


def _listed(items: Iterable[torch.dtype]) -> str:
    return " and ".join(sorted(map(str, items)))
