"""Layers that read the same input hand it on from one to the next.

Where q, k and v read one x, autograd would form each one's dx in a buffer of its own and add the buffers. Where k reads
x as q hands it on, and v as k does, each adds its product onto the next one's dx (`ops.linear_handing_on`). Who reads
after whom is learned from one forward to the next, and a layer whose input is another tensor is left alone.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Input(NamedTuple):
    """What the layers called last in this thread have read."""

    source: weakref.ref[Tensor]
    version: int
    readers: tuple[weakref.ref[nn.Module], ...]
    handed: Tensor | None  # in place of the source, for the next reader


_thread = threading.local()
# Each layer's next reader. An input is handed on only where there is one, because it holds the graph behind it.
_next_readers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def receive(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What `layer` should read: x, or x as the layer before handed it on in `dtype`."""
    last = getattr(_thread, "last", None)
    if last is None:
        return x
    # A second call of a layer with one x is another forward.
    same = last.source() is x and last.version == x._version and weakref.ref(layer) not in last.readers
    if not same or not torch.is_grad_enabled():
        _thread.last = None
        return x
    _thread.last = last._replace(handed=None)  # held no longer, even if the layer fails
    before = last.readers[-1]()
    if before is not None:
        _next_readers[before] = weakref.ref(layer)
    return x if last.handed is None or last.handed.dtype != dtype else last.handed


def hand_on(layer: nn.Module, x: Tensor, handed: Tensor | None) -> None:
    """`layer` has read x and hands on `handed`; None where it does not."""
    last = getattr(_thread, "last", None)
    _thread.last = None
    if handed is not None:
        readers = () if last is None else last.readers
        next_reader = _next_readers.get(layer)
        wanted = next_reader is not None and next_reader() is not None
        source = weakref.ref(x)
        _thread.last = _Input(source, x._version, (*readers, weakref.ref(layer)), handed if wanted else None)
