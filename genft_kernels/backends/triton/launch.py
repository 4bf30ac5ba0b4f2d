"""Small decisions that every Triton launch makes: blocks, depth, precision, dropout."""

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

from ...philox import threshold
from .. import LaunchError, lacks_memory
from .math import SLICE

_Parameters = ParamSpec("_Parameters")


def named(launcher: Callable[_Parameters, None]) -> Callable[_Parameters, None]:
    """A launcher whose failure tells the kernel: LaunchError. Memory that runs out is no fault of the kernel's."""

    @functools.wraps(launcher)
    def launch(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> None:
        try:
            launcher(*args, **kwargs)
        except Exception as error:
            if lacks_memory(error):
                raise
            problem = f"{type(error).__name__}: {error}"
            raise LaunchError(f"Triton kernel {launcher.__name__!r} failed to launch: {problem}") from error

    return launch


def edge(tensor: Tensor) -> int:
    """Edge of a tile: 64, or 32 in float32, whose products run without matrix instructions and fill the registers."""
    return 64 if tensor.dtype.itemsize == 2 else 32


def edge_at(k: int, tensor: Tensor) -> int:
    """`edge`, halved for each doubling of k beyond 256: a product of rank k keeps all its units in shared memory."""
    return max(SLICE, edge(tensor) >> max(0, (k - 1).bit_length() - 8))


def unit_block(k: int, tensor: Tensor) -> int:
    """How many hidden units an accumulator holds: a power of two from 16 to a tile's edge; more take more programs."""
    return min(edge(tensor), max(SLICE, 1 << (k - 1).bit_length()))


def ceil_divide(n: int, size: int) -> int:
    """How many times `size` covers n. Triton's own, which kernels may call too, takes 2 us of the host's time."""
    return -(-n // size)


def slices(k: int) -> int:
    """The number of 16-wide slices that cover k."""
    return ceil_divide(k, SLICE)


def precision(tensor: Tensor) -> str:
    """float32 products are exact, never tf32; 16-bit ones accumulate in float32 anyway."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


def stages(tensor: Tensor, deepest: int, stage_elements: int) -> int:
    """Depth of a software pipeline whose stages hold `stage_elements` each: the deepest that fits on the card.

    The deepest were the fastest on an H200, by a factor of two over two stages (docs/backends.md#measured). In float32,
    whose products run without matrix instructions, a deeper pipeline only fills the registers.
    """
    if tensor.dtype.itemsize == 4:
        return 2
    return max(2, min(deepest, shared_memory(tensor.device) // (stage_elements * tensor.dtype.itemsize)))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; where none are (compiling ahead of time), those of sm_80."""
    if device.type != "cuda":
        return 163 << 10
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def dropout_arguments(dropout: float) -> tuple[int, float]:
    """(threshold as a signed int64, 1 / (1 - p))."""
    return threshold(dropout), 1 / (1 - dropout)
