"""Whether tensors are what they were: the same objects in the same state, with the same values.

Versions tell of changes that go through autograd. Only the values tell of the others: through `.data`, by fused
optimizers, by views of the memory, by other processes. Thin tensors are compared in full, of W a sample along its
diagonal. On a CPU that is done in each forward, and takes about as long as reading them. On a device the answer would
have to be waited for, so it is read a forward later (`Watch`).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import _torch_private

_SAMPLES = 64  # of a frozen weight
_FIRST_BYTES = 256
_WORDS = {1: "B", 2: "H", 4: "I", 8: "Q"}  # unsigned integers by their size in bytes

# torch.equal takes eight times as long.
_memcmp = ctypes.PyDLL("msvcrt" if os.name == "nt" else None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class Snapshot:
    """Tensors as they were. None is kept alive, and none referred to: `torch.utils.swap_tensors` forbids it."""

    def __init__(self, thin: Iterable[Tensor], weight: Tensor | None = None, *, values: bool) -> None:
        """Of `thin` tensors, and of a frozen `weight`; with `values`, where they can be compared at once."""
        self._thin = [(_state(tensor), _bytes(tensor) if values else None) for tensor in thin]
        if weight is not None:
            at_once = values and compares_at_once(weight.device)
            self._weight = _state(weight), weight.stride(), _Elements(sample(weight)) if at_once else None

    def same(self, thin: Iterable[Tensor], weight: Tensor | None = None, *, in_full: bool = True) -> bool:
        """Whether they are the same ones, as they were; of the values only the first few without `in_full`."""
        for tensor, (state, copy) in zip(thin, self._thin, strict=True):
            if _state(tensor) != state or not (copy is None or copy.equals(tensor, in_full)):
                return False
        if weight is None:
            return True
        state, stride, elements = self._weight
        return _state(weight) == state and weight.stride() == stride and (elements is None or elements.same())


class Watch:
    """Tensors on a device, whose values are compared in one forward, and the answer read in the next."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._copies = [joined.clone() for joined in _joined(parts)]
        self._answers: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def look(self, parts: Sequence[Tensor]) -> None:
        """Have the values compared with those at the beginning."""
        for now, then in zip(_joined(parts), self._copies, strict=True):
            differs = (now != then).any()
            event = None
            if differs.is_cuda:
                differs = differs.to("cpu", non_blocking=True)
                event = torch.cuda.current_stream(now.device).record_event()
            self._answers.append((differs, event))

    def changed(self) -> bool:
        """Whether a comparison so far has found a difference; waits for it."""
        answers, self._answers = self._answers, []
        for _, event in answers:
            if event is not None:
                event.synchronize()
        return any(bool(differs) for differs, _ in answers)


def compares_at_once(device: torch.device) -> bool:
    """Whether the answer to a comparison need not be waited for."""
    return device.type == "cpu"


def sample(weight: Tensor) -> Tensor:
    """Elements of the diagonal, evenly spaced; a view."""
    if _torch_private.dispatch_modes_active():
        with _torch_private.hidden_from_selective_checkpointing():
            return _sample_unseen(weight)
    return _sample_unseen(weight)


def _sample_unseen(weight: Tensor) -> Tensor:
    extents = [(size, stride) for size, stride in zip(weight.shape, weight.stride(), strict=True) if size > 1]
    length = min((size for size, _ in extents), default=1)
    count = min(_SAMPLES, length)
    step = length // count
    return weight.detach().as_strided((count,), (step * sum(stride for _, stride in extents),))


def _state(tensor: Tensor) -> tuple:
    # An object that takes the place of another at its address has other values.
    version = None if tensor.is_inference() else tensor._version
    return (id(tensor), version, tensor.data_ptr(), tensor.requires_grad, tensor.dtype, tensor.numel())


def _bytes(tensor: Tensor) -> _Bytes | None:
    return _Bytes(tensor) if compares_at_once(tensor.device) else None


class _Bytes:
    """A copy of a tensor in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._address, self._size = self._copy.data_ptr(), self._copy.nbytes
        self._first = min(self._size, _FIRST_BYTES)

    def equals(self, tensor: Tensor, in_full: bool) -> bool:
        """Whether `tensor`, of the same number of elements and dtype, holds the same bytes, or begins with the same."""
        dense = tensor if tensor.is_contiguous() else tensor.detach().contiguous()
        return _memcmp(dense.data_ptr(), self._address, self._size if in_full else self._first) == 0


class _Elements:
    """A copy of some elements of a tensor at equal distances, and where in memory they are.

    PyTorch takes ten times as long to gather and compare them. For as long as the tensor's address, object and strides
    are the same, its memory is there to be read; otherwise `same` must not be called.
    """

    def __init__(self, view: Tensor) -> None:
        (count,), (stride,), size = view.shape, view.stride(), view.element_size()
        reach = (count - 1) * stride + 1
        memory = memoryview((ctypes.c_ubyte * (reach * size)).from_address(view.data_ptr())).cast("B")
        self._now = memory.cast(_WORDS[size])[:: stride or 1]
        self._then = memoryview(self._now.tobytes()).cast(_WORDS[size])

    def same(self) -> bool:
        """Whether the elements hold the same bytes as before."""
        return self._now == self._then


def _joined(parts: Sequence[Tensor]) -> list[Tensor]:
    """Their values in one tensor for each device: two launches for any number of them."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for part in parts:
        by_device.setdefault(part.device, []).append(part.detach().reshape(-1))
    return [torch.cat(flat) for flat in by_device.values()]
