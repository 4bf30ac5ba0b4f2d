"""Libraries compiled on first use and kept on disk: one folder for the CUDA kernels and for a CPU's tiles.

An entry is a library and a manifest with its digest, named by a key of all that the library follows from. A process
compiles in a folder of its own, under a lock, and renames the results into place, so nobody sees half of one. Code is
loaded only if it is what was compiled, and if no other user could have put it there (SECURITY.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .run import BuildError

VARIABLE = "GENFT_CACHE_DIR"
_CANNOT_KEEP = (OSError, NotImplementedError)  # the latter from filelock, where a filesystem has no locks


@dataclass(frozen=True)
class Library:
    """A library to have: its name in the cache, what it is in words, and how it is compiled and loaded."""

    name: str
    words: str
    follows_from: tuple  # all that decides what the compiled code is
    compile: Callable[[Path], Path]  # in an empty folder; the library's path
    load: Callable[[Path], Any]
    limit: float  # seconds to compile it in

    @property
    def entry(self) -> str:
        """The name of its files."""
        return f"{self.name}-{hashlib.sha256(repr(self.follows_from).encode()).hexdigest()[:24]}"


def obtain(library: Library) -> Any:
    """Load a library, compiled now unless the cache has it; what cannot be kept there is compiled anew, with a warning.

    Raises:
        BuildError: it cannot be had here; the message says why.
    """
    _check_system()
    try:
        return _from(cache_folder(), library)
    except _CANNOT_KEEP as error:
        reason = str(error)
    try:
        with tempfile.TemporaryDirectory(prefix="genft_kernels-", ignore_cleanup_errors=True) as own:
            loaded = _from(Path(own), library)  # needs the file no more
    except _CANNOT_KEEP as error:
        raise BuildError(f"there is no place to compile {library.words}: {reason}; {error}") from error
    warnings.warn(
        f"this process compiled {library.words} for itself, because the cache cannot be used: {reason}. "
        f"Set {VARIABLE} to a folder of your own",
        stacklevel=4,
    )
    return loaded


def state(library: Library) -> str:
    """In words, without compiling: whether the cache has the library; BuildError where it could not."""
    _check_system()
    try:
        folder = cache_folder()
        found = folder.exists() and _find(folder, library)
    except OSError as error:
        return f"compiled by each process for itself: {error}"
    return f"cached in {found}" if found else f"compiled on first use, kept in {folder}"


def cache_folder() -> Path:
    """GENFT_CACHE_DIR or the user's cache folder.

    Raises:
        BuildError: the variable is not the absolute path of a folder.
        OSError: the user has no home.
    """
    if (value := os.environ.get(VARIABLE)) is None:
        import platformdirs

        with contextlib.suppress(RuntimeError):  # of versions that refuse a user without a home; others answer "~"
            folder = Path(platformdirs.user_cache_dir("genft_kernels", appauthor=False))
            if folder.is_absolute():
                return folder
        raise OSError("this user has no home folder")
    folder = Path(os.path.expanduser(value))
    if not folder.is_absolute() or (os.path.exists(folder) and not os.path.isdir(folder)):
        raise BuildError(f"{VARIABLE} must be the absolute path of a folder; got {value!r}")
    return folder


def read_manifest(path: Path, **types: type) -> dict:
    """The manifest at `path`; ValueError unless it is a JSON object with a value of each of `types`."""
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    for key, kind in types.items():
        if not isinstance(manifest, dict) or not isinstance(manifest.get(key), kind):
            raise ValueError(f"{path.name} has no {key!r} of type {kind.__name__}")
    return manifest


def verify(library: Path, manifest: dict) -> None:
    """Raise ValueError if a library is not the one of its manifest: loading half of one kills the process."""
    if hashlib.sha256(library.read_bytes()).hexdigest() != manifest["sha256"]:
        raise ValueError(f"{library.name} is not the file that was compiled")


def say(text: str) -> None:
    """Tell the user on standard error."""
    print(f"genft_kernels: {text}", file=sys.stderr, flush=True)


def _check_system() -> None:
    """Raise BuildError where files have no owners, by whom code is trusted."""
    if not hasattr(os, "geteuid"):
        raise BuildError("code is compiled and loaded on Linux and macOS alone")


def _from(folder: Path, library: Library) -> Any:
    """The library of a cache folder, compiled into it unless it is there; OSError if the folder cannot be used."""
    import filelock

    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    with contextlib.suppress(BuildError):
        if (loaded := _load(folder, library)) is not None:
            return loaded
    lock = filelock.FileLock(folder / f"{library.name}.lock")
    try:
        held = lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"another process compiles {library.words}; waiting for it")
        held = lock.acquire(timeout=library.limit)  # its Timeout is an OSError
    with held:
        try:
            if (loaded := _load(folder, library)) is not None:  # another process was faster
                return loaded
        except BuildError as error:
            say(f"{error}: it is compiled anew")
        for leftover in folder.glob(f"{library.name}-*.building"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        say(f"compiling {library.words} in {folder}")
        start = time.perf_counter()
        _compile(folder, library)
        loaded = _load(folder, library)
    say(f"compiled {library.words} in {time.perf_counter() - start:.1f} s")
    return loaded


def _load(folder: Path, library: Library) -> Any:
    """Load the library of an entry; None if there is none, BuildError if it is damaged."""
    if (path := _find(folder, library)) is None:
        return None
    try:
        verify(path, read_manifest(path.with_suffix(".json"), sha256=str))
        return library.load(path)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error


def _compile(folder: Path, library: Library) -> None:
    """Compile an entry, readable by others as the umask says, in a folder that nobody else can look into."""
    path = folder / f"{library.entry}.so"
    with tempfile.TemporaryDirectory(".building", f"{library.name}-", folder, ignore_cleanup_errors=True) as staging:
        compiled = library.compile(Path(staging))
        if not compiled.is_file():
            raise BuildError(f"the compiler said nothing and wrote no {compiled.name}")
        content = compiled.read_bytes()
        manifest = {"content": library.words, "sha256": hashlib.sha256(content).hexdigest()}
        for target, data in ((path, content), (path.with_suffix(".json"), json.dumps(manifest).encode())):
            whole = Path(staging) / target.name
            with open(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
                file.write(data)
            os.replace(whole, target)


def _find(folder: Path, library: Library) -> Path | None:
    """The path of a library in the cache; None if it is not there.

    Raises:
        OSError: code from this folder cannot be loaded, or could be another user's. Root's is as good as one's own.
    """
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise OSError(f"{folder} is mounted noexec")
    path = folder / f"{library.entry}.so"
    entry = (path, path.with_suffix(".json"))
    found = all(file.exists() for file in entry)
    for place in (folder, *(entry if found else ())):
        status = place.stat()
        if status.st_uid not in (0, os.geteuid()):
            raise PermissionError(f"{place} belongs to another user (uid {status.st_uid})")
        if status.st_mode & 0o022:
            raise PermissionError(f"{place} can be written by others (chmod go-w takes that away)")
    return path if found else None
