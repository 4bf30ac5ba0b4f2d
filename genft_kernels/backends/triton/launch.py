"""Small decisions that every Triton launch makes: padding, precision, seeds."""

import torch
import triton
from torch import Tensor

from .math import SLICE


def edge(tensor: Tensor) -> int:
    """Edge of a tile: 64, or 32 in float32, whose products run without matrix instructions and fill the registers."""
    return 64 if tensor.dtype.itemsize == 2 else 32


def unit_block(k: int, tensor: Tensor) -> int:
    """How many hidden units an accumulator holds: a power of two from 16 to a tile's edge; more take more programs."""
    return min(edge(tensor), max(SLICE, triton.next_power_of_2(k)))


def matrix_block(tokens: Tensor) -> int:
    """Edge of an output tile of a big product: 128 for many 16-bit tokens, else that of any tile."""
    return 128 if tokens.dtype.itemsize == 2 and tokens.shape[0] >= 128 else edge(tokens)


def slices(k: int) -> int:
    """The number of 16-wide slices that cover k."""
    return triton.cdiv(k, SLICE)


def precision(tensor: Tensor) -> str:
    """float32 products are exact, never tf32; 16-bit ones accumulate in float32 anyway."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


def dropout_arguments(dropout: float) -> tuple[int, float]:
    """(threshold as a signed int64, 1 / (1 - p))."""
    return int(dropout * 2**32), 1 / (1 - dropout)
