"""The compiled CUDA kernels: those of the wheel, those of an earlier use, or compiled now.

A build is a folder with the extension and its manifest. The cache has one for each combination of sources, flags,
versions and cards, made in a folder of its own and renamed into place, so that no process ever sees half of one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from .. import __version__
from ._build import MANIFEST, BuildError, Nvcc, Recipe, arch_of, build, compile_flags, covers, find_nvcc

CACHE_VARIABLE = "GENFT_CACHE_DIR"
PREBUILT = Path(__file__).parent.parent / "prebuilt"

_mutex = threading.Lock()
_loaded: dict[Path, ModuleType] = {}
_failures: dict[str, str] = {}  # key of a build: what the compiler said


def load(source: Path | None = None) -> ModuleType:
    """The extension module of the kernels, compiled from `source` (the package's `csrc`) if need be.

    Raises:
        BuildError: it cannot be had here; the message says why. A failed compilation is not tried twice in a process.
    """
    source = source or package_sources()
    with _mutex:
        if source not in _loaded:
            recipe = Recipe.read(source)
            prebuilt = _usable(PREBUILT) if _prebuilt_fits(recipe) else None
            _loaded[source] = prebuilt or _from_cache(recipe)
        return _loaded[source]


@functools.cache
def unavailable_reason() -> str | None:
    """Why `load` cannot work here, as far as can be told without running a compiler, or None. Asked once a process."""
    try:
        if not _prebuilt_fits(Recipe.read(package_sources())):
            find_nvcc()
    except BuildError as error:
        return str(error)
    return None


def state() -> str:
    """In words: which nvcc there is, and whether the kernels are prebuilt, cached or yet to be compiled."""
    try:
        recipe = Recipe.read(package_sources())
        if _prebuilt_fits(recipe):
            return f"CUDA kernels: prebuilt for {', '.join(_manifest(PREBUILT)['archs'])} in {PREBUILT}"
        plan = _plan(recipe)
        folder = cache_folder() / plan.key
    except BuildError as error:
        return f"CUDA kernels: cannot be compiled: {error}"
    cached = (folder / MANIFEST).is_file()
    return (
        f"nvcc: {plan.nvcc.path} (found by {plan.nvcc.found_by}), version {plan.version}\n"
        f"CUDA kernels: {f'cached in {folder}' if cached else f'compiled on first use for {plan.archs_text}'}"
    )


class _Plan(NamedTuple):
    """What to compile, by what, for what, and the name of the result in the cache."""

    recipe: Recipe
    nvcc: Nvcc
    version: str
    archs: tuple[str, ...]
    key: str

    @property
    def archs_text(self) -> str:
        return ", ".join(self.archs)


def _plan(recipe: Recipe) -> _Plan:
    import pybind11

    nvcc = find_nvcc()
    version, archs = nvcc.version(), _archs_present() or recipe.archs
    parts = [
        __version__,
        recipe.digest(),
        compile_flags(recipe, archs),
        version,
        sysconfig.get_config_var("EXT_SUFFIX"),
        pybind11.__version__,
    ]
    return _Plan(recipe, nvcc, version, archs, hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24])


def _from_cache(recipe: Recipe) -> ModuleType:
    plan, cache = _plan(recipe), cache_folder()
    if plan.key in _failures:
        raise BuildError(_failures[plan.key])
    try:
        return _usable(cache / plan.key) or _compile_into(cache, plan)
    except OSError as error:
        if CACHE_VARIABLE in os.environ:
            raise BuildError(f"{CACHE_VARIABLE}: cannot keep compiled kernels in {cache}: {error}") from error
        warnings.warn(
            f"compiled kernels cannot be kept in {cache} ({error}), so this process compiles its own; "
            f"set {CACHE_VARIABLE} to a folder that can be written",
            stacklevel=4,
        )
    with tempfile.TemporaryDirectory(prefix="genft_kernels-") as folder:
        return _compile_into(Path(folder), plan)  # once loaded, it needs the file no more


def _compile_into(cache: Path, plan: _Plan) -> ModuleType:
    """Compile under a lock across processes, unless another process did so meanwhile."""
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(cache / f"{plan.key}.lock"):
        if (module := _usable(cache / plan.key)) is not None:
            return module
        for leftover in cache.glob(f"{plan.key}.*.building"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{plan.key}.", suffix=".building", dir=cache))
        _say(f"compiling the CUDA kernels for {plan.archs_text} with nvcc {plan.version}, kept in {cache}")
        try:
            manifest = build(plan.recipe, plan.nvcc, plan.archs, folder)
            shutil.rmtree(cache / plan.key, ignore_errors=True)  # a damaged one
            folder.rename(cache / plan.key)
            module = import_build(cache / plan.key)
        except (BuildError, ImportError) as error:
            _failures[plan.key] = str(error)
            raise BuildError(str(error)) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    _say(f"compiled the CUDA kernels in {manifest['seconds']} s")
    return module


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    import filelock

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        _say("another process compiles the CUDA kernels; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _usable(folder: Path) -> ModuleType | None:
    """The module of a build; None if there is none, or, with a message, if it is damaged."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        return import_build(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        _say(f"the CUDA kernels in {folder} are damaged and not used: {error}")
        return None


def _manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def import_build(folder: Path) -> ModuleType:
    """Import a build; ValueError if its file is not the one that was compiled."""
    manifest = _manifest(folder)
    path = folder / manifest["module"]
    if hashlib.sha256(path.read_bytes()).hexdigest() != manifest["sha256"]:
        raise ValueError(f"{path.name} is not the file that was compiled")
    loader = importlib.machinery.ExtensionFileLoader(path.name.partition(".")[0], str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def _prebuilt_fits(recipe: Recipe) -> bool:
    """Whether the wheel brought kernels of these sources, for this Python, that run on every card present."""
    try:
        manifest = _manifest(PREBUILT)
    except (OSError, ValueError):
        return False
    same = (manifest["sources"], manifest["python"]) == (recipe.digest(), sysconfig.get_config_var("EXT_SUFFIX"))
    return same and all(covers(manifest["archs"], capability) for capability in _capabilities())


def _archs_present() -> tuple[str, ...]:
    return tuple(sorted({arch_of(capability) for capability in _capabilities()}))


def _capabilities() -> list[tuple[int, int]]:
    """Of the cards that can run the kernels; none on a machine without a GPU."""
    found = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    return [capability for capability in found if capability >= (8, 0)]


@functools.cache
def package_sources() -> Path:
    package = Path(__file__).parent.parent
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def cache_folder() -> Path:
    """GENFT_CACHE_DIR or the user's cache folder; BuildError if the variable is not a folder's absolute path."""
    if (value := os.environ.get(CACHE_VARIABLE)) is None:
        import platformdirs

        return Path(platformdirs.user_cache_dir("genft_kernels", appauthor=False))
    folder = Path(value).expanduser()
    if not folder.is_absolute() or (folder.exists() and not folder.is_dir()):
        raise BuildError(f"{CACHE_VARIABLE} must be the absolute path of a folder; got {value!r}")
    return folder


def _say(text: str) -> None:
    print(f"genft_kernels: {text}", file=sys.stderr, flush=True)
