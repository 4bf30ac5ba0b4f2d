"""Launches of the CUDA kernels of `csrc/`: how tensors become addresses, strides and codes (genft.h).

A big matrix keeps its memory if one of its strides is 1. What is cast or copied lives as long as the call. float32
products are exact, 16-bit ones accumulate in float32, and every sum has a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...activations import ACTIVATIONS
from .. import LaunchError
from . import extension

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # codes of genft.h
_EDGE = 64  # of a tile of the kernels
_MOST_FEATURES = 65535 * _EDGE  # what CUDA's grids allow


def launch(kernel: str, *arguments) -> None:
    """Start a kernel by the name of its launcher in `csrc/genft.h`, on the current stream of its tensors' device.

    Tensors go as their addresses, None as 0, activations as their codes.

    Raises:
        LaunchError: the launch failed; the message has the kernel's name and CUDA's words.
        BuildError: the kernels cannot be compiled here.
    """
    module = extension.load()
    device = device_of(arguments)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        code = getattr(module, kernel)(*map(encoded, arguments), stream)
    raise_for(code, kernel, module)


def raise_for(code: int, kernel: str, module) -> None:
    """LaunchError if a launcher returned an error."""
    if code:
        raise LaunchError(f"CUDA kernel {kernel!r} failed to launch: {module.error_string(code)} (error {code})")


def encoded(argument):
    """An argument of `launch` as its launcher takes it."""
    match argument:
        case None:
            return 0
        case Tensor():
            return argument.data_ptr()
        case list():
            return [matrix.data_ptr() for matrix in argument]
        case torch.dtype():
            return _DTYPES[argument]
        case str():
            return ACTIVATIONS.index(argument)
        case _:
            return argument


def tensors_of(arguments) -> list[Tensor]:
    """The tensors among the arguments of `launch`."""
    lists = (argument if isinstance(argument, list) else [argument] for argument in arguments)
    return [item for items in lists for item in items if isinstance(item, Tensor)]


def device_of(arguments) -> torch.device:
    """The one device of all tensors; RuntimeError if there are several."""
    devices = {tensor.device for tensor in tensors_of(arguments)}
    if len(devices) > 1:
        raise RuntimeError(f"the tensors of a CUDA kernel must be on one device, not on {_listed(devices)}")
    return devices.pop()


def _listed(items) -> str:
    return " and ".join(sorted(map(str, items)))


def _check_features(*features: int) -> None:
    if max(features) > _MOST_FEATURES:
        raise ValueError(f"the CUDA kernels take at most {_MOST_FEATURES} features, got {max(features)}")


def _as_stored(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, int, bool]:
    """(the matrix [m, n] in `dtype`, the distance of its rows, False), or (.., of its columns, True) if it lies
    transposed. A copy is made only for another dtype or strides of which none is 1."""
    matrix = matrix.to(dtype)
    (rows, columns), (row, column) = matrix.shape, matrix.stride()
    if column == 1 or columns == 1:
        return matrix, row, False
    if row == 1 or rows == 1:
        return matrix, column, True
    return matrix.contiguous(), columns, False


def _list_as_stored(matrices: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], int, bool]:
    """`_as_stored` for layers of one shape; those that lie otherwise than the first are copied."""
    stored = [_as_stored(matrix, dtype) for matrix in matrices]
    layout = stored[0][1:]
    if any(other[1:] != layout for other in stored):
        layout = matrices[0].shape[1], False
        stored = [(matrix.contiguous(), *layout) for matrix, *_ in stored]
    return [matrix for matrix, *_ in stored], *layout


def _rows(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """(tokens [T, n] whose rows are contiguous, the distance of the rows)."""
    matrix = matrix.to(dtype)
    matrix = matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()
    return matrix, matrix.stride(0)


def _dropout(dropout: float) -> tuple[int, float]:
    """(threshold, 1 / (1 - p)) of docs/method.md#random-numbers."""
    return int(dropout * 2**32), 1 / (1 - dropout)


# --- launchers, as `plan.Kernels` describes them --------------------------------------------------------------------

SPLITS_TOKENS = False


def thin_product(matrices: list[Tensor], thin: Tensor, bias: Tensor | None, activation: str, out: Tensor, pre) -> None:
    """Write activation(matrix [m, n] thin[k, n]^T + bias), and its argument, to `out` and `pre` [L, m, k]."""
    (layers, k, n), m = thin.shape, out.shape[1]
    stored = _list_as_stored(matrices, thin.dtype)
    launch("thin_product", *stored, thin, bias, out, pre, layers, m, n, k, activation, thin.dtype)


def thin_transposed(dz: Tensor, matrices: list[Tensor], out: Tensor, rows: int) -> None:
    """Write dz [L, m, k]^T matrix [m, n], in parts of `rows` rows, to `out` [L, part, k, n]."""
    (layers, m, k), n = dz.shape, out.shape[3]
    launch("thin_transposed", dz, *_list_as_stored(matrices, dz.dtype), out, layers, m, n, k, rows, dz.dtype)


def row_forward(left, right, down, bias, seed, outer: str, dropout: float, inner: str, out, pre) -> None:
    """Write h = phi(Y^T A^T + a), and phi's argument, to `out` and `pre` [L, in, k]."""
    (layers, n_out, k1), n_in, k = left.shape, right.shape[1], down.shape[1]
    launch(
        "row_forward", left, right, down, bias, seed, out, pre, layers, n_out, n_in, k1, k, *_dropout(dropout), outer,
        inner, left.dtype,
    )  # fmt: skip


def row_backward(left, right, down, dz, seed, outer: str, dropout: float, dleft, dright, ddown) -> None:
    """Write the gradients of left, right and down to `dleft`, `dright` and `ddown`, those that are not None."""
    (layers, n_out, k1), n_in, k = left.shape, right.shape[1], down.shape[1]
    given, settings = (left, right, down, dz, seed), (layers, n_out, n_in, k1, k, *_dropout(dropout), outer, left.dtype)
    if dleft is not None or ddown is not None:
        launch("row_backward_out", *given, dleft, ddown, *settings)
    if dright is not None:
        launch("row_backward_in", *given, dright, *settings)


def fold(weight, h, b, seed, scale, activation, dropout, stream, out: Tensor) -> None:
    """Write W + scale * drop(psi(b h^T)) to `out` [out, in], which lies in memory as W does."""
    (n_out, n_in), k = weight.shape, h.shape[1]
    _check_features(n_out, n_in)
    launch(
        "fold", *_as_stored(weight, h.dtype), b, h, seed, out, n_out, n_in, k, *_dropout(dropout), stream, scale,
        activation, h.dtype,
    )  # fmt: skip


def contract(dy, x, h, b, seed, scale, activation, dropout, stream, dh, db, tokens: int) -> None:
    """Write the parts of dh [out tile, in, k] and db [in tile, out, k], those that are not None; all tokens at once."""
    (t, n_out), (n_in, k) = dy.shape, h.shape
    _check_features(n_out, n_in)
    launch(
        "contract", *_rows(dy, h.dtype), *_rows(x, h.dtype), b, h, seed, dh, db, t, n_out, n_in, k,
        *_dropout(dropout), stream, scale, activation, h.dtype,
    )  # fmt: skip


def tile_of_contract(dy: Tensor, k: int, activation: str, dropout: float) -> tuple[int, int]:
    """Edges of a tile of G, along out and in."""
    return _EDGE, _EDGE
