"""Whether tensors are what they were: the same objects in the same state, with the same values.

Versions tell of changes that go through autograd. Only the values tell of the others: through `.data`, by views of
the memory, by other processes. Thin tensors are compared in full, of W a sample along its diagonal (`Snapshot`). On a
CPU that is done once a forward of the model, in between a look at the first bytes does (`Glance`). On a device the
answer would have to be waited for, so it is read a forward later (`Watch`).
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Collection, Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .. import _torch_private

_SAMPLES = 16  # of a frozen weight; each is a page that nobody else looks at
_FIRST_BYTES = 64  # a cache line
_WORDS: dict[int, Any] = {1: "B", 2: "H", 4: "I", 8: "Q"}  # unsigned integers by their size in bytes

# torch.equal takes eight times as long.
_memcmp = ctypes.PyDLL("msvcrt" if os.name == "nt" else None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

_properties = attrgetter("_version", "dtype", "requires_grad", "shape")
_version, _requires_grad = attrgetter("_version"), attrgetter("requires_grad")
_version_and_training = attrgetter("_version", "requires_grad")


class Snapshot:
    """Tensors as they were. None is kept alive, and none referred to: `torch.utils.swap_tensors` forbids it."""

    def __init__(self, thin: Iterable[Tensor], weight: Tensor | None = None, *, values: bool) -> None:
        """Of `thin` tensors, and of a frozen `weight`; with `values`, where they can be compared at once."""
        thin = list(thin)
        self._states = _states(thin if weight is None else [weight, *thin])
        self.memory: list[tuple[int, bytes, int]] = []
        self.strided: list[tuple[int, Tensor]] = []  # compared by copies, which takes longer
        for index, tensor in enumerate(thin if values else ()):
            if not compares_at_once(tensor.device):
                continue
            if tensor.is_contiguous():
                address, size = tensor.data_ptr(), tensor.nbytes
                self.memory.append((address, ctypes.string_at(address, size), size))
            else:
                self.strided.append((index, tensor.detach().contiguous()))
        sampled = weight if values and weight is not None and compares_at_once(weight.device) else None
        self.sample = None if sampled is None else _Elements(sample(sampled))

    def same(self, thin: Collection[Tensor], weight: Tensor | None = None) -> bool:
        """Whether they are the same ones, as they were."""
        if self._states is None or _states(thin if weight is None else [weight, *thin]) != self._states:
            return False
        for address, then, size in self.memory:  # which is theirs, as their states say
            if _memcmp(address, then, size) != 0:
                return False
        for index, copy in self.strided:
            if _memcmp(list(thin)[index].detach().contiguous().data_ptr(), copy.data_ptr(), copy.nbytes) != 0:
                return False
        return self.sample is None or self.sample.same()

    def begins_as(self, other: Snapshot) -> bool:
        """Whether the first tensor of both, a frozen weight, is one in one state."""
        if self._states is None or other._states is None:
            return False
        return [part[0] for part in self._states] == [part[0] for part in other._states]


class Together:
    """Several snapshots as one, laid out so that few calls compare them and little memory is touched.

    A layer's turn comes after another's weights went through the cache: what is looked at for one costs several times
    what it costs for one of many.
    """

    def __init__(self, snapshots: Sequence[Snapshot], tensors: Sequence[Tensor]) -> None:
        """Of snapshots that have just been found the same, and of all their `tensors`."""
        self._states = _flat_states(tensors)
        memory = [part for snapshot in snapshots for part in snapshot.memory]
        self._addresses, self._sizes = (
            array("Q", [part[0] for part in memory]),
            array("Q", [part[2] for part in memory]),
        )
        self._copies = [copy for _, copy, _ in memory]
        samples = [snapshot.sample for snapshot in snapshots if snapshot.sample is not None]
        self._now, self._then = [each.now for each in samples], [each.then for each in samples]

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether they are the same ones, as they were."""
        return (
            _flat_states(tensors) == self._states
            and not any(map(_memcmp, self._addresses, self._copies, self._sizes))
            and self._now == self._then
        )


class Glance:
    """A cheap check that tensors which `Snapshot` has just compared in full have not changed since.

    They are the same objects, with the same addresses, versions and first bytes, and the same of them train.
    """

    def __init__(self, tensors: Sequence[Tensor], *, values: bool, gradients: bool) -> None:
        self._objects, self._addresses = list(map(id, tensors)), list(map(Tensor.data_ptr, tensors))
        # Which of them train matters where gradients are recorded, and is left out of the time of a token.
        self._state = _version_and_training if gradients else _version
        self._states = list(map(self._state, tensors))
        seen = [tensor for tensor in tensors if values and compares_at_once(tensor.device) and tensor.numel()]
        self._now = [_first_bytes(tensor) for tensor in seen]
        self._then = [memoryview(now.tobytes()).cast(now.format) for now in self._now]  # type: ignore[call-overload]

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether they are the same objects at the same places, in the same states and of the same first values."""
        return (
            list(map(id, tensors)) == self._objects
            and list(map(Tensor.data_ptr, tensors)) == self._addresses
            and list(map(self._state, tensors)) == self._states
            and self._now == self._then  # their memory, as their addresses say
        )


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


def _flat_states(tensors: Sequence[Tensor]) -> tuple[array[int] | bytes, ...] | None:
    """As `_states`, in little memory."""
    try:
        numbers = [array("Q", map(number, tensors)) for number in (id, Tensor.data_ptr, _version, Tensor.numel)]
    except RuntimeError:  # has no version
        return None
    return *numbers, *(bytes(map(flag, tensors)) for flag in (Tensor.is_contiguous, _requires_grad))


def _first_bytes(tensor: Tensor) -> memoryview:
    """The beginning of its memory, as it is at any time: one element, or a few where they lie side by side."""
    size = min(tensor.nbytes, _FIRST_BYTES) if tensor.is_contiguous() else tensor.element_size()
    memory = memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")
    return memory.cast("Q") if size % 8 == 0 else memory


def _states(tensors: Collection[Tensor]) -> tuple[list, ...] | None:
    """A key that tells most changes of them; None of tensors that were made in inference mode, where nothing does."""
    # An object that takes the place of another at its address has other values.
    objects, addresses = list(map(id, tensors)), list(map(Tensor.data_ptr, tensors))
    try:
        return objects, addresses, list(map(_properties, tensors)), list(map(Tensor.stride, tensors))
    except RuntimeError:  # has no version
        return None


class _Elements:
    """A copy of some elements of a tensor at equal distances, and where in memory they are.

    PyTorch takes ten times as long to gather and compare them. For as long as the tensor's address, object and strides
    are the same, its memory is there to be read; otherwise `same` must not be called.
    """

    def __init__(self, view: Tensor) -> None:
        (count,), (stride,), size = view.shape, view.stride(), view.element_size()
        reach = (count - 1) * stride + 1
        memory = memoryview((ctypes.c_ubyte * (reach * size)).from_address(view.data_ptr())).cast("B")
        self.now = memory.cast(_WORDS[size])[:: stride or 1]
        self.then = memoryview(self.now.tobytes()).cast(_WORDS[size])

    def same(self) -> bool:
        """Whether the elements hold the same bytes as before."""
        return self.now == self.then


def _joined(parts: Sequence[Tensor]) -> list[Tensor]:
    """Their bytes, a tensor for each device and dtype: NaN differs from itself, and float8 cannot be compared."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for part in parts:
        alike.setdefault((part.device, part.dtype), []).append(part.detach().reshape(-1))
    return [torch.cat(flat).view(torch.uint8) for flat in alike.values()]
