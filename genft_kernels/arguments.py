"""One way to say which argument is wrong, what it must be and what it is; warnings that point at the user's line."""

from __future__ import annotations

import contextlib
import contextvars
import math
import numbers
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import TypeGuard

_SHOWN = 80  # characters of a value in a message
_about = contextvars.ContextVar("_about", default="")
_told = contextvars.ContextVar("_told", default=False)


def check_type(name: str, value: object, wanted: type | tuple[type, ...], optional: bool = False) -> None:
    """Raise TypeError, naming the argument and the type it has, unless `value` is of a wanted type."""
    if isinstance(value, wanted) or (optional and value is None):
        return
    kinds = " or ".join(kind.__name__ for kind in (wanted if isinstance(wanted, tuple) else (wanted,)))
    raise TypeError(f"{name} must be a {kinds}{' or None' if optional else ''}, got {described(value)}")


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False: "no" would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {described(value)}")


def described(value: object) -> str:
    """The kind of a wrong value, and the value itself where it is short."""
    kind = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    return f"{kind} {shown(value)}" if isinstance(value, (str, int, float, bytes)) else kind


def shown(value: object) -> str:
    """`repr`, cut off where it is long: it may come from a file, and be nested or hundreds of digits."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def listing(names: Iterable[str], most: int) -> str:
    """Names for a message, side by side; of those beyond `most` how many there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an integer, Python's or as good as one; no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[float]:
    """Whether it is a finite number, a Python one or as good as one; no tensor, no bool."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return -math.inf < float(value) < math.inf  # math.isfinite would break the graph of torch.compile
    except OverflowError:  # an integer beyond the floats
        return False


@contextlib.contextmanager
def about(subject: str) -> Iterator[None]:
    """Within the context a ValueError, a TypeError or a warning begins with what it is about."""
    token = _about.set(f"{subject}: ")
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{subject}: {error}") from None
    finally:
        _about.reset(token)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Within the context `warn` says nothing: the user has been warned of these values."""
    token = _told.set(True)
    try:
        yield
    finally:
        _told.reset(token)


def warn(message: str) -> None:
    """A UserWarning at the first line outside this package, and outside `dataclasses` with its `replace`."""
    if _told.get():
        return
    within, frame, level = (__package__, "dataclasses"), sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in within:
        frame, level = frame.f_back, level + 1
    warnings.warn(_about.get() + message, stacklevel=level)
