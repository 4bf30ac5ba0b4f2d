"""Small decisions that every Triton launch makes: padding, precision, seeds."""

import torch
import triton
from torch import Tensor

from .triton_math import SLICE


def unit_block(k: int) -> int:
    """How many hidden units an accumulator holds: k padded to a power of two from 16 to 64; more go to more programs."""
    return min(64, max(SLICE, triton.next_power_of_2(k)))


def slices(k: int) -> int:
    """The number of 16-wide slices that cover k."""
    return triton.cdiv(k, SLICE)


def precision(tensor: Tensor) -> str:
    """float32 products are exact, never tf32; 16-bit ones accumulate in float32 anyway."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


def dropout_arguments(dropout: float, seed: Tensor | None, device: torch.device) -> tuple[Tensor, int, float]:
    """(seed tensor, threshold as a signed int64, 1 / (1 - p)); the seed stays on the device."""
    seed = torch.zeros(1, dtype=torch.int64, device=device) if seed is None else seed
    return seed, int(dropout * 2**32), 1 / (1 - dropout)
