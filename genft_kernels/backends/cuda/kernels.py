"""The CUDA kernels of `csrc/` as functions of tensors: checks, memory for results, and one launch each.

Thin matrices are made contiguous here; a big matrix keeps its memory if one of its strides is 1. What is cast or
copied lives as long as the call. float32 products are exact, 16-bit ones accumulate in float32, and every sum has a
fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...activations import ACTIVATIONS, activation_backward
from . import extension

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # codes of genft.h
DTYPES = tuple(_DTYPES)
_EDGE = 64  # of a tile of the kernels
_MOST_FEATURES = 65535 * _EDGE  # what CUDA's grids allow


def launch(kernel: str, *arguments) -> None:
    """Start a kernel by the name of its launcher in `csrc/genft.h`, on the current stream of its tensors' device.

    Tensors go as their addresses, None as 0, activations as their codes.

    Raises:
        RuntimeError: the launch failed; the message has the kernel's name and CUDA's words.
        BuildError: the kernels cannot be compiled here.
    """
    module = extension.load()
    device = device_of(arguments)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        code = getattr(module, kernel)(*map(encoded, arguments), stream)
    raise_for(code, kernel, module)


def raise_for(code: int, kernel: str, module) -> None:
    """RuntimeError if a launcher returned an error."""
    if code:
        raise RuntimeError(f"CUDA kernel {kernel!r} failed to launch: {module.error_string(code)} (error {code})")


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


def _dtype(*tensors: Tensor | None) -> torch.dtype:
    """The compute dtype that the given tensors share."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(dtypes) > 1:
        raise TypeError(f"the factors of a CUDA kernel must be of one dtype, not of {_listed(dtypes)}")
    dtype = dtypes.pop()
    if dtype not in _DTYPES:
        raise TypeError(f"the CUDA kernels compute in {_listed(DTYPES)}, not in {dtype}")
    return dtype


def _check_shapes(
    seed: Tensor | None = None, layers: int = 1, **expected: tuple[Tensor | None, tuple[int, ...]]
) -> None:
    """ValueError that names the tensor whose shape is not the expected one; the kernels would read beside it."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != layers):
        raise ValueError(f"seed must be int64 with {layers} elements, got {seed.dtype} with {seed.numel()}")


def _check_features(*features: int) -> None:
    if max(features) > _MOST_FEATURES:
        raise ValueError(f"the CUDA kernels take at most {_MOST_FEATURES} features, got {max(features)}")


def _tiles(n: int) -> int:
    return -(-n // _EDGE)


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


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _dropout(dropout: float) -> tuple[int, float]:
    """(threshold, 1 / (1 - p)) of docs/method.md#random-numbers."""
    return int(dropout * 2**32), 1 / (1 - dropout)


# --- thin products --------------------------------------------------------------------------------------------------


def thin_product(
    matrices: list[Tensor], thin: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    """(activation(matrix [m, n] thin[k, n]^T + bias [k]), its argument or None), both [L, m, k] in thin's dtype.

    `matrices` are L of one shape; `thin` is [L, k, n].
    """
    dtype, (m, n), layers, k = _dtype(thin, bias), matrices[0].shape, len(matrices), thin.shape[1]
    _check_shapes(thin=(thin, (layers, k, n)), bias=(bias, (k,)), **_of_one_shape(matrices))
    out = thin.new_empty((layers, m, k))
    pre = None if activation == "identity" else torch.empty_like(out)
    if m:
        thin, bias = _contiguous(thin, bias)
        stored = _list_as_stored(matrices, dtype)
        launch("thin_product", *stored, thin, bias, out, pre, layers, m, n, k, activation, dtype)
    return out, pre


def thin_transposed(grad: Tensor, matrices: list[Tensor], pre: Tensor | None, activation: str) -> Tensor:
    """(grad * activation'(pre))[L, m, k]^T matrix [m, n]: [L, k, n] in grad's dtype, summed in a fixed order."""
    dtype, (m, n), layers, k = _dtype(grad), matrices[0].shape, len(matrices), grad.shape[2]
    _check_shapes(
        grad=(grad, (layers, m, k)),
        pre=(pre if activation != "identity" else None, (layers, m, k)),
        **_of_one_shape(matrices),
    )
    dz = activation_backward(activation, grad, pre).contiguous()
    # Enough blocks for a large card, but at least 512 rows for each.
    splits = max(1, min(-(-256 // (_tiles(n) * _tiles(k) * layers)), -(-m // 512)))
    rows = max(1, _tiles(-(-m // splits))) * _EDGE
    out = torch.empty((layers, max(1, -(-m // rows)), k, n), dtype=torch.float32, device=grad.device)
    launch("thin_transposed", dz, *_list_as_stored(matrices, dtype), out, layers, m, n, k, rows, dtype)
    return (out[:, 0] if out.shape[1] == 1 else out.sum(1)).to(dtype)


def _of_one_shape(matrices: list[Tensor]) -> dict:
    return {f"matrix {index}": (matrix, tuple(matrices[0].shape)) for index, matrix in enumerate(matrices)}


# --- the row stage --------------------------------------------------------------------------------------------------


def row_forward(left, right, down, bias, seed, outer: str, dropout: float, inner: str) -> tuple[Tensor, Tensor | None]:
    """(h [L, in, k], what the inner activation was applied to or None)."""
    dtype, (layers, n_out, k1), n_in, k = _dtype(left, right, down, bias), left.shape, right.shape[1], down.shape[1]
    _check_shapes(
        seed, layers, right=(right, (layers, n_in, k1)), down=(down, (layers, k, n_out)), bias=(bias, (k,))
    )  # fmt: skip
    h = down.new_empty((layers, n_in, k))
    pre = None if inner == "identity" else torch.empty_like(h)
    launch(
        "row_forward", *_contiguous(left, right, down, bias, seed), h, pre, layers, n_out, n_in, k1, k,
        *_dropout(dropout), outer, inner, dtype,
    )  # fmt: skip
    return h, pre


def row_backward(grad, left, right, down, pre, seed, outer: str, dropout: float, inner: str, needs: list[bool]):
    """(dleft [L, out, k1], dright [L, in, k1], dA [L, k, out], da [k]), those that `needs` names."""
    need_left, need_right, need_down, need_bias = needs
    dtype, (layers, n_out, k1), n_in, k = _dtype(grad, left, right, down), left.shape, right.shape[1], down.shape[1]
    _check_shapes(
        seed, layers, right=(right, (layers, n_in, k1)), down=(down, (layers, k, n_out)),
        grad=(grad, (layers, n_in, k)), pre=(pre if inner != "identity" else None, (layers, n_in, k)),
    )  # fmt: skip
    dz = activation_backward(inner, grad, pre)  # [L, in, k]
    left, right, down, dz, seed = _contiguous(left, right, down, dz, seed)
    given = left, right, down, dz, seed
    settings = layers, n_out, n_in, k1, k, *_dropout(dropout), outer, dtype
    dleft, dright, ddown = (
        torch.empty_like(matrix) if need else None
        for matrix, need in ((left, need_left), (right, need_right), (down, need_down))
    )
    if need_left or need_down:
        launch("row_backward_out", *given, dleft, ddown, *settings)
    if need_right:
        launch("row_backward_in", *given, dright, *settings)
    return dleft, dright, ddown, dz.sum((0, 1), dtype=torch.float32).to(dtype) if need_bias else None


# --- the token side -------------------------------------------------------------------------------------------------


def fold(weight, h, b, seed, scale, activation, dropout, stream) -> Tensor:
    """W + scale * drop(psi(b h^T)) [out, in] in the factors' dtype; it lies in memory as W does."""
    dtype, (n_out, n_in), k = _dtype(h, b), weight.shape, h.shape[1]
    _check_features(n_out, n_in)
    _check_shapes(seed, h=(h, (n_in, k)), b=(b, (n_out, k)))
    weight, stride, transposed = _as_stored(weight, dtype)
    out = h.new_empty((n_in, n_out)).t() if transposed else h.new_empty((n_out, n_in))
    launch(
        "fold", weight, stride, transposed, *_contiguous(b, h, seed), out, n_out, n_in, k,
        *_dropout(dropout), stream, scale, activation, dtype,
    )  # fmt: skip
    return out


def contract(dy, x, h, b, seed, scale, activation, dropout, stream, need_h: bool, need_b: bool):
    """(dh [in, k], db [out, k]) in the factors' dtype, None where not needed."""
    dtype, (t, n_out), (n_in, k) = _dtype(dy, x, h, b), dy.shape, h.shape
    _check_features(n_out, n_in)
    _check_shapes(seed, x=(x, (t, n_in)), b=(b, (n_out, k)))
    dh = torch.empty((_tiles(n_out), n_in, k), dtype=torch.float32, device=dy.device) if need_h else None
    db = torch.empty((_tiles(n_in), n_out, k), dtype=torch.float32, device=dy.device) if need_b else None
    launch(
        "contract", *_rows(dy, dtype), *_rows(x, dtype), *_contiguous(b, h, seed), dh, db, t, n_out, n_in, k,
        *_dropout(dropout), stream, scale, activation, dtype,
    )  # fmt: skip
    return dh.sum(0).to(dtype) if need_h else None, db.sum(0).to(dtype) if need_b else None
