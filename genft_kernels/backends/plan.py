"""What stands between the operations and the kernels of Triton and CUDA, once for both.

A backend's launchers only write. Here their arguments are checked, memory for results is made, long sums are split, and
parts are added up in a fixed order.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import activation_backward
from ..config import is_factored
from . import KERNEL_DTYPES
from .eager import operations as eager

_EDGE = 64  # of a tile, in whose multiples long sums are split


class Kernels:
    """The kernels of a backend as functions of tensors.

    Args:
        launchers: what writes into the tensors that it is given:

            thin_product(matrices, thin, bias, activation, out, pre)
            thin_transposed(dz, matrices, out, rows)  # a part of `out` for each `rows` rows
            row_forward(left, right, down, bias, seed, outer, dropout, inner, out, pre)
            row_backward(left, right, down, dz, seed, outer, dropout, dleft, dright, ddown)
            fold(weight, h, b, seed, scale, activation, dropout, stream, out)
            contract(dy, x, h, b, seed, scale, activation, dropout, stream, dh, db, tokens)

            as the functions of these names here, and what `contract` makes parts of: `tile_of_contract(dy, k,
            activation, dropout)`, its edges along out and in, and `SPLITS_TOKENS`, whether it splits the tokens too.
            Thin matrices come contiguous, big ones of any strides and perhaps of another dtype.
    """

    def __init__(self, launchers: ModuleType | SimpleNamespace):
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
        out = thin.new_empty((layers, m, k))
        pre = None if activation == "identity" else torch.empty_like(out)
        if m:
            self._launchers.thin_product(matrices, *_contiguous(thin, bias), activation, out, pre)
        return out, pre

    def thin_transposed(self, dz: Tensor, matrices: list[Tensor]) -> Tensor:
        """dz [L, m, k]^T matrix [m, n]: [L, k, n] in dz's dtype, summed in a fixed order."""
        (m, n), layers, k = matrices[0].shape, len(matrices), dz.shape[2]
        _check_dtype(dz)
        _check_shapes(dz=(dz, (layers, m, k)), **_of_one_shape(matrices))
        # Enough programs for a large card, but at least 512 rows for each.
        splits = max(1, min(-(-256 // (_tiles(n) * _tiles(k) * layers)), -(-m // 512)))
        rows = max(1, _tiles(-(-m // splits))) * _EDGE
        out = torch.empty((layers, max(1, -(-m // rows)), k, n), dtype=torch.float32, device=dz.device)
        self._launchers.thin_transposed(dz.contiguous(), matrices, out, rows)
        return (out[:, 0] if out.shape[1] == 1 else out.sum(1)).to(dz.dtype)

    def row_forward(
        self, left, right, down, bias, seed, outer: str, dropout: float, inner: str
    ) -> tuple[Tensor, Tensor | None]:
        """(h [L, in, k], what the inner activation was applied to or None)."""
        self._check_row(left, right, down, seed, bias=(bias, (down.shape[1],)))
        out = down.new_empty((*right.shape[:2], down.shape[1]))
        pre = None if inner == "identity" else torch.empty_like(out)
        thin = _contiguous(left, right, down, bias, seed)
        self._launchers.row_forward(*thin, outer, dropout, inner, out, pre)
        return out, pre

    def row_backward(self, grad, left, right, down, pre, seed, outer: str, dropout: float, inner: str, needs):
        """(dleft [L, out, k1], dright [L, in, k1], dA [L, k, out], da [k]), those that `needs` names."""
        *need_matrices, need_bias = needs
        shape = *right.shape[:2], down.shape[1]
        pre = pre if inner != "identity" else None
        self._check_row(left, right, down, seed, grad=(grad, shape), pre=(pre, shape))
        dz = activation_backward(inner, grad, pre)  # [L, in, k]
        given = _contiguous(left, right, down)
        grads = [torch.empty_like(each) if need else None for each, need in zip(given, need_matrices, strict=True)]
        if any(need_matrices):
            self._launchers.row_backward(*given, *_contiguous(dz, seed), outer, dropout, *grads)
        return *grads, dz.sum((0, 1), dtype=torch.float32).to(grad.dtype) if need_bias else None

    def fold(self, weight, h, b, seed, scale, activation, dropout, stream) -> Tensor:
        """W + scale * drop(psi(b h^T)) [out, in] in the factors' dtype; it lies in memory as W does."""
        (n_out, n_in), k = weight.shape, h.shape[1]
        _check_dtype(h, b)
        _check_shapes(seed, h=(h, (n_in, k)), b=(b, (n_out, k)))
        transposed = weight.stride(0) == 1 and weight.stride(1) != 1
        out = h.new_empty((n_in, n_out)).t() if transposed else h.new_empty((n_out, n_in))
        thin = _contiguous(h, b, seed)
        self._launchers.fold(weight, *thin, scale, activation, dropout, stream, out)
        return out

    def contract(self, dy, x, h, b, seed, scale, activation, dropout, stream, need_h: bool, need_b: bool):
        """(dh [in, k], db [out, k]) in the factors' dtype, None where not needed."""
        (t, n_out), (n_in, k) = dy.shape, h.shape
        _check_dtype(dy, x, h, b)
        _check_shapes(seed, x=(x, (t, n_in)), b=(b, (n_out, k)))
        edges = self._launchers.tile_of_contract(dy, k, activation, dropout)
        out_tiles, in_tiles = (-(-n // edge) for n, edge in zip((n_out, n_in), edges, strict=True))
        splits = 1
        if self._launchers.SPLITS_TOKENS:  # enough programs for a large card, but at least 512 tokens for each
            splits = max(1, min(-(-128 // (out_tiles * in_tiles)), t // 512))
        tokens = max(1, _tiles(-(-t // splits))) * _EDGE
        splits = max(1, -(-t // tokens))
        dh = torch.empty((splits * out_tiles, n_in, k), dtype=torch.float32, device=dy.device) if need_h else None
        db = torch.empty((splits * in_tiles, n_out, k), dtype=torch.float32, device=dy.device) if need_b else None
        thin = _contiguous(h, b, seed)
        self._launchers.contract(dy, x, *thin, scale, activation, dropout, stream, dh, db, tokens)
        return tuple(None if parts is None else parts.sum(0).to(h.dtype) for parts in (dh, db))

    def _check_row(self, left, right, down, seed, **more) -> None:
        (layers, n_out, k1), n_in, k = left.shape, right.shape[1], down.shape[1]
        _check_dtype(left, right, down, *(tensor for tensor, _ in more.values()))
        _check_shapes(seed, layers, right=(right, (layers, n_in, k1)), down=(down, (layers, k, n_out)), **more)


class KernelOperations:
    """`column`, `row`, `linear` and their `_backward`s, by kernels where they beat PyTorch's own."""

    def __init__(self, kernels: Kernels):
        self._kernels = kernels

    def column(self, weights: list[Tensor], down: Tensor, bias: Tensor | None, activation: str):
        """h = phi(W A^T + a)  [L, out, k]."""
        return self._kernels.thin_product(weights, down, bias, activation)

    def column_backward(self, grad: Tensor, weights: list[Tensor], pre: Tensor, activation: str, needs: list[bool]):
        """dA = dZ^T W  [L, k, in], da = sum of dZ  [k]."""
        need_down, need_bias = needs
        dz = activation_backward(activation, grad, pre)  # [L, out, k]
        ddown = self._kernels.thin_transposed(dz, weights) if need_down else None
        return ddown, dz.sum((0, 1), dtype=torch.float32).to(grad.dtype) if need_bias else None

    def row(self, left, right, down, bias, seed, outer: str, dropout: float, inner: str):
        """h = phi(Y^T A^T + a)  [L, in, k]; factored, only k x k and thin products are left, which PyTorch does."""
        function = eager.row if is_factored(outer, dropout) else self._kernels.row_forward
        return function(left, right, down, bias, seed, outer, dropout, inner)

    def row_backward(self, grad, left, right, down, pre, seed, outer: str, dropout: float, inner: str, needs):
        """(dleft [L, out, k1], dright [L, in, k1], dA [L, k, out], da [k])."""
        function = eager.row_backward if is_factored(outer, dropout) else self._kernels.row_backward
        return function(grad, left, right, down, pre, seed, outer, dropout, inner, needs)

    def linear(self, x, weight, bias, h, b, seed, scale: float, activation: str, dropout: float, stream: int):
        """(y = x (W + scale * drop(psi(b h^T)))^T + bias  [..., out], x h  [tokens, k] in the factored form).

        Factored, a vendor's products do it all. Tiled, the update is folded into W for one.
        """
        update = seed, scale, activation, dropout, stream
        if is_factored(activation, dropout):
            return eager.linear(x, weight, bias, h, b, *update)
        return F.linear(x, self._kernels.fold(weight, h, b, *update), bias), None

    def linear_backward(self, grad, x, weight, h, b, xh, seed, scale, activation, dropout, stream, needs):
        """(dx [..., in], dbias [out], dh [in, k], db [out, k])."""
        update = seed, scale, activation, dropout, stream
        if is_factored(activation, dropout):
            return eager.linear_backward(grad, x, weight, h, b, xh, *update, needs)
        need_x, need_bias, need_h, need_b = needs
        dy = grad.reshape(-1, grad.shape[-1])  # [T, out]
        dx = dh = db = None
        if need_h or need_b:
            dh, db = self._kernels.contract(dy, x.reshape(-1, x.shape[-1]), h, b, *update, need_h, need_b)
        if need_x:
            dx = grad @ self._kernels.fold(weight, h, b, *update)
        dbias = dy.sum(0, dtype=torch.float32).to(grad.dtype) if need_bias else None
        return dx, dbias, dh, db


def _tiles(n: int) -> int:
    return -(-n // _EDGE)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _check_dtype(*tensors: Tensor | None) -> None:
    """TypeError unless the given tensors share a dtype that kernels compute in."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(dtypes) > 1:
        raise TypeError(f"the factors of a kernel must be of one dtype, not of {_listed(dtypes)}")
    if not dtypes <= set(KERNEL_DTYPES):
        raise TypeError(f"the kernels compute in {_listed(KERNEL_DTYPES)}, not in {dtypes.pop()}")


def _check_shapes(
    seed: Tensor | None = None, layers: int = 1, **expected: tuple[Tensor | None, tuple[int, ...]]
) -> None:
    """ValueError that names the tensor whose shape is not the expected one; the kernels would read beside it."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != layers):
        raise ValueError(f"seed must be int64 with {layers} elements, got {seed.dtype} with {seed.numel()}")


def _of_one_shape(matrices: list[Tensor]) -> dict:
    return {f"matrix {index}": (matrix, tuple(matrices[0].shape)) for index, matrix in enumerate(matrices)}


def _listed(items) -> str:
    return " and ".join(sorted(map(str, items)))
