"""Measurements on a device: the backend that `tune` found the fastest, by the shape of an operation.

A table is loaded once and holds for the process, so that backward and recomputation choose as forward did
(docs/backends.md#choice).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from .. import _torch_private
from ..arguments import shown
from . import card
from .compiled import cache
from .names import OPERATION_BACKENDS

VARIABLE = "GENFT_CHOICES"
_WHAT = "choices"
_KEY = "genft_kernels/choices"  # in the store of a process group
_PATIENCE = 60  # seconds for which ranks wait for rank 0

_tables: dict[torch.device, Mapping[str, str]] = {}
_noted: list[Call] | None = None


class Shape(NamedTuple):
    """The circumstances that a choice follows from; its words are the keys of a table."""

    tiled: bool
    dtype: torch.dtype
    n_in: int
    n_out: int
    k: int
    tokens: int  # 0 for the weight side; else a power of two, the next one
    backward: bool

    def __str__(self) -> str:
        form = "tiled" if self.tiled else "factored"
        side = f"{self.tokens} tokens" if self.tokens else "generation"
        way = "backward" if self.backward else "forward"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{form}, {dtype}, {self.n_in} x {self.n_out}, k {self.k}, {side}, {way}"


def shape_of(operation: str, tiled: bool, args: tuple[Any, ...]) -> Shape | None:
    """The shape of an operation with these arguments (genft_kernels/ops.py); None if they do not tell."""
    backward, tokens = operation.endswith("_backward"), 0
    match operation.removesuffix("_backward"), backward:
        case "column", _:
            thin, weights = args[:2] if backward else (args[1], args[0])
            (n_out, n_in), k = weights[0].shape, thin.shape[2 if backward else 1]
        case "row", _:
            left, right, down = args[1:4] if backward else args[:3]
            n_out, n_in, k = left.shape[1], right.shape[1], down.shape[1]
        case _:
            of_tokens, h, b = args[0], args[3], args[4]
            if h is None or b is None:  # backward in the factored form, without some gradient
                return None
            n_in, n_out, k = h.shape[0], b.shape[0], h.shape[1]
            tokens = power_of_two(of_tokens.numel() // max(1, of_tokens.shape[-1]))
            if tokens == 0:
                return None
    return Shape(tiled, first_tensor(args).dtype, n_in, n_out, k, tokens, backward)


def first_tensor(args: Sequence[Any]) -> Tensor:
    """The first tensor of an operation's arguments, of its device and dtype."""
    first: Tensor = args[0] if isinstance(args[0], Tensor) else args[1]
    return first


class Call(NamedTuple):
    """An operation that had to choose."""

    shape: Shape
    operation: str
    args: tuple[Any, ...]


@contextlib.contextmanager
def noting() -> Iterator[list[Call]]:
    """Within the context the operations of this process that have to choose are noted, and take nothing measured."""
    global _noted
    _noted, before = [], _noted
    try:
        yield _noted
    finally:
        _noted = before


def note(operation: str, tiled: bool, args: tuple[Any, ...]) -> None:
    """Note an operation, if somebody wants to know (`noting`)."""
    if _noted is not None and (shape := shape_of(operation, tiled, args)) is not None:
        _noted.append(Call(shape, operation, args))


def power_of_two(tokens: int) -> int:
    """The next power of two from a number of tokens on; 0 for none."""
    return 1 << (tokens - 1).bit_length() if tokens > 0 else 0


def table(device: torch.device) -> Mapping[str, str]:
    """The backend that was the fastest by the words of a `Shape`; empty where nothing was measured."""
    if _noted is not None:
        return {}
    if (known := _tables.get(device)) is None:
        known = _tables.setdefault(device, _load(device))
    return known


def save(device: torch.device, found: Mapping[str, str]) -> Path:
    """Add what was measured to the table of a device on disk, and return its path. Processes wait for each other.

    It holds from the next process on, or in this one if nothing has asked for a choice on the device yet.

    Raises:
        OSError: it cannot be kept.
        BuildError: GENFT_CACHE_DIR is no folder's absolute path.
    """
    import filelock

    path = card.file(_WHAT, device)
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock"), timeout=60):
        known = _read(path, device) if path.exists() else {}
        card.write(path, {"made_for": card.identity(device), "choices": {**known, **found}})
    return path


def _load(device: torch.device) -> Mapping[str, str]:
    value = os.environ.get(VARIABLE)
    if value == "off":
        return {}
    if value is not None:
        path = Path(value)
        if not path.is_file():
            raise RuntimeError(f"{VARIABLE} must be off or the path of a file that tune wrote; got {shown(value)}")
        return _read(path, device, same=("card", "capability"))  # driver and versions may be others
    try:
        if not any(cache.cache_folder().glob(f"{_WHAT}-*.json")):  # not even what a file would be called is asked for
            return {}
        path = card.file(_WHAT, device)
    except OSError:
        return {}  # there is no folder
    except RuntimeError as error:
        warnings.warn(f"no table of tune is read: {error}", stacklevel=2)
        return {}
    return _read(path, device) if path.exists() else {}


def _read(path: Path, device: torch.device, same: tuple[str, ...] = ()) -> dict[str, str]:
    """The table of a file; an empty one, with a warning, if it is damaged or its card differs, in what `same` names."""
    try:
        content = card.read(path)
        made_for, found = content.get("made_for"), content.get("choices")
        here = card.identity(device)
        if not isinstance(made_for, dict) or any(made_for.get(name) != here[name] for name in same or here):
            raise ValueError(f"it was not made for {here['card']} as it is now")
        if not isinstance(found, dict) or not set(map(str, found.values())) <= set(OPERATION_BACKENDS):
            raise ValueError("its choices are not names of backends")
    except ValueError as error:
        warnings.warn(f"the choices in {path} are not used: {error}", RuntimeWarning, stacklevel=2)
        return {}
    return found


# --- ranks ----------------------------------------------------------------------------------------------------------


def agree() -> None:
    """With a process group, have every rank choose by the tables of rank 0, so that all compute alike.

    Every rank calls it; of the group nothing but its store takes part. A rank on another card than rank 0's, or with
    other versions, goes without tables, with a warning.

    Raises:
        RuntimeError: rank 0 has not called it for a minute.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    store = _torch_private.store_of_process_group()
    if distributed.get_rank() == 0:
        told = [(device.type, card.identity(device), dict(found)) for device in _devices() if (found := table(device))]
        store.set(_KEY, json.dumps(told))
        return
    store.wait([_KEY], datetime.timedelta(seconds=_PATIENCE))
    told = json.loads(store.get(_KEY))
    for device in _devices():
        of_type = [(made_for, found) for kind, made_for, found in told if kind == device.type]
        fitting = [found for made_for, found in of_type if made_for == card.identity(device)]
        if not fitting and (of_type or table(device)):
            warnings.warn(
                f"rank {distributed.get_rank()} uses no measured choices for {device}: rank 0 has "
                + ("another card or other versions" if of_type else "none"),
                RuntimeWarning,
                stacklevel=3,
            )
        _tables[device] = fitting[0] if fitting else {}


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
