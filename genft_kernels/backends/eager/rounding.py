"""Stochastic rounding to 16 bits, cheap enough for every forward: a dither table instead of fresh random numbers.

Drawing a Philox word for each weight takes longer than the matrix product that follows. What the rounding needs is
only that its errors be unbiased and unrelated to the values, so the words are drawn once into a table and each call
reads it from a place that the seed gives. Forward and backward share the seed and so rebuild the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch

from ...philox import ROUNDING_STREAM, words

_TABLE_SIZE = 1 << 20
# Mantissa bits that a float32 loses.
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}


def round_stochastically(exact: torch.Tensor, seed: torch.Tensor | None, out: torch.Tensor, first: int = 0) -> None:
    """Write `exact` (float32, overwritten) to `out` (bfloat16 or float16), up or down with the odds of its distance.

    `seed` None is a fixed seed; `first` is which element of a matrix the first of `exact` is. NaN and infinities stay
    what they are. float16 numbers below 2**-14 are rounded to nearest in part, which is exact to their spacing of
    2**-24.
    """
    bits, integers = _DROPPED_BITS[out.dtype], exact.view(torch.int32)
    # CUDA's NaN has all bits, to which nothing can be added; this one has few.
    exact.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf)
    if exact.device.type == "cpu":
        for piece, dither in _against_table(integers, *dither_of(out.dtype, seed, first)):
            piece += dither
    else:
        table = _dither_table(bits, exact.device)
        integers += _gathered(table, seed, integers.numel(), first).view(integers.shape)
    integers.bitwise_and_(-(1 << bits))
    out.copy_(exact)


def dither_of(dtype: torch.dtype, seed: torch.Tensor | None, first: int) -> tuple[torch.Tensor, int]:
    """On a CPU (the table, its entry for element `first`); each further element has the next one, round and round."""
    start = first if seed is None else first + int(seed)
    return _dither_table(_DROPPED_BITS[dtype], torch.device("cpu")), start % _TABLE_SIZE


def _against_table(
    integers: torch.Tensor, table: torch.Tensor, start: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pair up the elements of `integers` with consecutive entries of `table` from `start` on, wrapping round."""
    flat, done = integers.view(-1), 0
    while done < flat.numel():
        count = min(flat.numel() - done, table.numel() - start)
        yield flat[done : done + count], table[start : start + count]
        done, start = done + count, 0


def _gathered(table: torch.Tensor, seed: torch.Tensor | None, count: int, first: int) -> torch.Tensor:
    """The same entries as a tensor [count], for a device that must not be waited for to read the seed."""
    places = torch.arange(first, first + count, device=table.device)
    if seed is not None:
        places += seed % _TABLE_SIZE
    return table[places.remainder_(_TABLE_SIZE)]


@functools.cache
def _dither_table(bits: int, device: torch.device) -> torch.Tensor:
    """Uniform integers in [0, 2**bits), int32 [_TABLE_SIZE].

    Made on the CPU and copied in whole: a kernel would fill it on the current stream, where another could not wait for
    it, or never, where that is being captured in a graph.
    """
    seed = torch.zeros(1, dtype=torch.int64, device="cpu")
    table = words(torch.arange(_TABLE_SIZE // 4, device="cpu"), seed, ROUNDING_STREAM).reshape(-1) >> (32 - bits)
    return table.to(torch.int32).to(device)
