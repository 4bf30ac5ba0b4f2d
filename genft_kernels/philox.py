"""Counter-based random numbers: Philox4x32-10 in plain PyTorch (Salmon et al., SC 2011; docs/method.md#random-numbers).

Element (i of in, j of out) of an update reads word `j % 4` of the block whose counter is
`(q low, q high, stream, 0)`, `q = i * ceil(out / 4) + j // 4`, and whose key is the 64-bit seed. A mask is thus a
function of (seed, stream, i, j) alone: the same on every backend and whenever it is computed again.
"""

from __future__ import annotations

import torch

from .scratch import scratch

COLUMN_STREAM = 0
ROW_STREAM = 1
ROUNDING_STREAM = 2

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_ROUNDS = 10
# Counters are worked on in pieces: on a CPU large enough for two threads and small enough for their caches; elsewhere
# so large that the hundred launches for each piece cost less than its work.
_PIECE = 3 << 14
_DEVICE_PIECE = 1 << 20


def words(counters: torch.Tensor, seed: torch.Tensor, stream: int) -> torch.Tensor:
    """Philox4x32-10 words.

    Args:
        counters: q, int64 [n], each at least 0.
        seed: the 64-bit key, int64 with one element.
        stream: the third word of the counter.

    Returns:
        int64 [n, 4], each in [0, 2**32).
    """
    out = torch.empty((counters.numel(), 4), dtype=torch.int64, device=counters.device)
    keys, size = _key_schedule(seed), _piece(seed.device)
    for piece, target in zip(counters.split(size), out.split(size), strict=True):
        for index, word in enumerate(_rounds(piece, keys, stream)):
            torch.bitwise_and(word, _LOW, out=target[:, index])
    return out


def keep_mask(
    seed: torch.Tensor, stream: int, in_features: int, out_features: int, dropout: float, rows: slice = slice(None)
) -> torch.Tensor:
    """Which elements of an update survive dropout: kept iff word >= floor(dropout * 2**32).

    Args:
        seed: int64 with one element, on the device that the mask is wanted on.
        rows: the out indices wanted; must start at a multiple of 4.

    Returns:
        bool [rows, in], contiguous: the orientation of a weight.
    """
    first, last, count = blocks_of(rows, out_features)
    blocks = torch.arange(first, last, device=seed.device)
    inputs = torch.arange(in_features, device=seed.device) * -(-out_features // 4)
    keep = torch.empty((blocks.numel(), 4, in_features), dtype=torch.bool, device=seed.device)
    least, keys = threshold(dropout), _key_schedule(seed)
    step = max(1, _piece(seed.device) // max(1, in_features))
    for piece, target in zip(blocks.split(step), keep.split(step), strict=True):
        for index, word in enumerate(_rounds((piece[:, None] + inputs).reshape(-1), keys, stream)):
            torch.ge(word.bitwise_and_(_LOW).view(-1, in_features), least, out=target[:, index])
    return keep.view(-1, in_features)[:count]


def threshold(dropout: float) -> int:
    """The least word that is kept."""
    return int(dropout * 2**32)


def blocks_of(rows: slice, out_features: int) -> tuple[int, int, int]:
    """(first block of four rows, the one after the last, number of rows); ValueError where `rows` start amid one."""
    start, stop, _ = rows.indices(out_features)
    if start % 4:
        raise ValueError(f"rows must start at a multiple of 4, got {start}")
    return start // 4, -(-stop // 4), stop - start


def _piece(device: torch.device) -> int:
    return _PIECE if device.type == "cpu" else _DEVICE_PIECE


def _key_schedule(seed: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The two key words of each round, as 0-dimensional tensors: no value leaves the device."""
    rounds = torch.arange(_ROUNDS, device=seed.device)
    halves = (seed.reshape(()) & _LOW, (seed.reshape(()) >> 32) & _LOW)
    columns = [((half + rounds * weyl) & _LOW).unbind() for half, weyl in zip(halves, _WEYL, strict=True)]
    return list(zip(*columns, strict=True))


def _rounds(
    counters: torch.Tensor, keys: list[tuple[torch.Tensor, torch.Tensor]], stream: int
) -> tuple[torch.Tensor, ...]:
    """The four words of every counter [n], each [n], with garbage in the upper 32 bits of their int64.

    Works in scratch memory. Only a word about to be multiplied needs clean upper bits; the other two carry the full
    products. The first round is written out because there `c2` and `c3` are the same for every counter.
    """
    c0, c1, c2, c3, product_0, product_1 = (
        scratch(f"philox {index}", counters.shape, torch.int64, counters.device) for index in range(6)
    )
    (key_0, key_1), *later_keys = keys
    c1.fill_(stream * _MULTIPLIER_1)
    torch.bitwise_and(counters, _LOW, out=c3).mul_(_MULTIPLIER_0)
    torch.bitwise_right_shift(c3, 32, out=c2).bitwise_xor_(key_1).bitwise_and_(_LOW)
    torch.bitwise_right_shift(counters, 32, out=c0).bitwise_xor_(key_0 ^ (stream * _MULTIPLIER_1 >> 32)).bitwise_and_(
        _LOW
    )
    for key_0, key_1 in later_keys:
        torch.mul(c0, _MULTIPLIER_0, out=product_0)
        torch.mul(c2, _MULTIPLIER_1, out=product_1)
        torch.bitwise_right_shift(product_1, 32, out=c0).bitwise_xor_(key_0).bitwise_xor_(c1).bitwise_and_(_LOW)
        torch.bitwise_right_shift(product_0, 32, out=c2).bitwise_xor_(key_1).bitwise_xor_(c3).bitwise_and_(_LOW)
        c1, product_1 = product_1, c1
        c3, product_0 = product_0, c3
    return c0, c1, c2, c3
