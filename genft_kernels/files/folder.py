"""A folder that several processes save into and read from: one saver at a time, and files replaced whole.

A saver holds the folder's lock, writes each file beside its place under a name that nobody can foresee, and renames
it once it is on the disk. What a saver that was killed has left behind, the next one removes. Readers need no lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".adapter.lock"
LOCK_SECONDS = 60.0

# Staged files of this version, and of those that named them by the process.
_LEFTOVER = re.compile(r"\.adapter_(?:model\.safetensors|config\.json)\.(?:[0-9a-f]{32}|\d{1,10})|\.previous\.\d{1,10}")
# A symbolic link that somebody has put in the way is an error, not a way to another file.
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


@contextlib.contextmanager
def only_saver(directory: Path) -> Iterator[None]:
    """Within the context no other saver is at work in `directory`, and there are no leftovers of earlier ones.

    Where the platform or the file system has no locks, savers must not meet, and leftovers stay.

    Raises:
        TimeoutError: another saver did not finish within `LOCK_SECONDS`.
        OSError: the folder cannot be written.
    """
    lock = _lock(directory)
    try:
        if lock is not None:
            for entry in directory.iterdir():
                if _LEFTOVER.fullmatch(entry.name):
                    entry.unlink(missing_ok=True)
        yield
    finally:
        if lock is not None:
            (directory / LOCK_FILE).unlink(missing_ok=True)
            fcntl.flock(lock, fcntl.LOCK_UN)  # a process forked meanwhile has the descriptor, too
            os.close(lock)


def stage(path: Path, content: bytes) -> Path:
    """Write `content` to the disk beside `path`, with the access rights of a new file; the place it is at."""
    staged = path.with_name(f".{path.name}.{secrets.token_hex(16)}")
    try:
        with os.fdopen(os.open(staged, _NEW_FILE, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    return staged


def put(staged: Path, path: Path) -> None:
    """Rename `staged` to `path`, for good: the old file or the new one, whatever happens."""
    os.replace(staged, path)
    sync_folder(path.parent)


def sync_folder(directory: Path) -> None:
    """Bring the names in `directory` to the disk, where the platform can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _lock(directory: Path) -> int | None:
    """The descriptor of the lock, held; None where there are no locks."""
    if fcntl is None:
        return None
    path, deadline = directory / LOCK_FILE, time.monotonic() + LOCK_SECONDS
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            path.unlink(missing_ok=True)  # the link; nothing of what it leads to
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still_at(path, descriptor):  # the one before removed it, perhaps while this one was waiting
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process has been saving into {directory} for {LOCK_SECONDS:g} s") from None
            time.sleep(0.005)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        except BaseException:  # an interrupt
            os.close(descriptor)
            raise


def _is_still_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False
