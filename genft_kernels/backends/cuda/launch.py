"""A launch of a kernel of `csrc/`: how tensors become addresses, strides and codes (genft.h).

A big matrix keeps its memory if one of its strides is 1. What is cast or copied lives as long as the call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...activations import ACTIVATIONS
from ...philox import threshold
from .. import LaunchError
from ..eager.update_tile import Update
from . import extension

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # codes of genft.h


def launch(kernel: str, *arguments: object) -> None:
    """Start a kernel by the name of its launcher in `csrc/genft.h`, on the current stream of its tensors' device.

    Tensors go as their addresses, None as 0, activations and dtypes as their codes, structures as tuples.

    Raises:
        LaunchError: the launch failed; the message has the kernel's name and CUDA's words.
        BuildError: the kernels cannot be compiled here.
    """
    start(device_of(arguments), kernel, arguments)


def start(device: torch.device, kernel: str, arguments: tuple[object, ...]) -> None:
    """`launch` on the device of its tensors; tests/cuda_host has another."""
    module = extension.load()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        code = getattr(module, kernel)(*map(encoded, arguments), stream)
    raise_for(code, kernel, module)


def raise_for(code: int, kernel: str, module: ModuleType) -> None:
    """LaunchError if a launcher returned an error."""
    if code:
        raise LaunchError(f"CUDA kernel {kernel!r} failed to launch: {module.error_string(code)} (error {code})")


def encoded(argument: Any) -> Any:
    """An argument of `launch` as its launcher takes it."""
    match argument:
        case None:
            return 0
        case Tensor():
            return argument.data_ptr()
        case list() | tuple():
            return tuple(map(encoded, argument))
        case torch.dtype():
            return _DTYPES[argument]
        case str():
            return ACTIVATIONS.index(argument)
        case _:
            return argument


def tensors_of(arguments: Iterable[object]) -> Iterator[Tensor]:
    """The tensors among the arguments of `launch`."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from tensors_of(argument)


def device_of(arguments: Iterable[object]) -> torch.device:
    """The one device of all tensors; RuntimeError if there are several."""
    devices = {tensor.device for tensor in tensors_of(arguments)}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"the tensors of a CUDA kernel must be on one device, not on {names}")
    return devices.pop()


# --- the structures of genft.h --------------------------------------------------------------------------------------


def matrix(given: Tensor, dtype: torch.dtype) -> tuple[Tensor, int, bool]:
    """A matrix [m, n] in `dtype`: (it, the distance of its rows, False), or (.., of its columns, True) if it lies
    transposed. A copy is made only for another dtype or strides of which none is 1."""
    stored = given.to(dtype)
    (rows, columns), (row, column) = stored.shape, stored.stride()
    if column == 1 or columns == 1:
        return stored, row, False
    if (row == 1 and column > 0) or rows == 1:  # 0: one column, expanded, which a cast would lay out by rows
        return stored, column, True
    return stored.contiguous(), columns, False


def matrices(given: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], int, bool, int, int, int]:
    """Matrices of one shape, one a layer; those that lie otherwise than the first are copied."""
    stored = [matrix(each, dtype) for each in given]
    layout, (rows, columns) = stored[0][1:], given[0].shape
    if any(other[1:] != layout for other in stored):
        layout = columns, False
        stored = [(each.contiguous(), *layout) for each, *_ in stored]
    return [each for each, *_ in stored], *layout, len(given), rows, columns


def rows(given: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Tokens [T, n] in `dtype`: (they, the distance of their rows). A copy is made only where rows have gaps, as in the
    gradient of a sum, or for another dtype."""
    stored = given.to(dtype)
    stored = stored if stored.stride(1) == 1 or stored.shape[1] == 1 else stored.contiguous()
    return stored, stored.stride(0)


def update(given: Update, layers: int = 1) -> tuple[object, ...]:
    """An update, or a stack of them."""
    left, right, activation, dropout, seed, stream = given
    sizes = layers, left.shape[-2], right.shape[-2], left.shape[-1]
    return left, right, seed, *sizes, threshold(dropout), 1 / (1 - dropout), stream, activation
