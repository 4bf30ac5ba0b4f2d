"""Memory for tiles that is used again from call to call on the CPU.

The C library gives large freed blocks back to the system, and the first touch of a fresh one costs a page fault
every 4 KiB: for a tile that a few elementwise passes go over, as much time as those passes. CUDA's caching
allocator has no such cost, so other devices get ordinary tensors.
"""

from __future__ import annotations

import math
import threading

import torch


class _Slots(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}


_slots = _Slots()
_LARGEST_KEPT = 1 << 24  # bytes; more than a tile, less than anyone would miss


def scratch(slot: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor; on the CPU its memory is shared with the last one from `slot` in this thread.

    It must not outlive the operation that asked for it, nor be returned from it.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size > _LARGEST_KEPT:
        return torch.empty(shape, dtype=dtype, device=device)
    buffer = _slots.buffers.get(slot)
    if buffer is None or buffer.numel() < size:
        buffer = _slots.buffers[slot] = torch.empty(size, dtype=torch.uint8, device=device)
    return buffer[:size].view(dtype).view(shape)
