"""The extension module of the CUDA kernels: the wheel's, that of an earlier use, or compiled now."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

from ..._version import __version__
from ..compiled import build, cache
from ..compiled.build import Nvcc, Recipe
from ..compiled.run import BuildError

PREBUILT = Path(__file__).parents[2] / "prebuilt"


def load(source: Path | None = None) -> ModuleType:
    """The module, compiled from `source` (the package's `csrc`) if need be.

    Raises:
        BuildError: it cannot be had here; the message says why. What failed is not tried twice in a process.
    """
    outcome = _outcome(source or build.package_sources())
    if isinstance(outcome, str):
        raise BuildError(outcome)
    return outcome


@functools.cache
def _outcome(source: Path) -> ModuleType | str:
    """The module, or why it cannot be had."""
    try:
        recipe = Recipe.read(source)
        return _prebuilt(recipe) or cache.obtain(_library(recipe, build.find_nvcc()))
    except BuildError as error:
        return str(error)


@functools.cache
def unavailable_reason() -> str | None:
    """Why `load` cannot work here, as far as can be told without running a compiler, or None. Asked once a process."""
    try:
        if not _fitting(Recipe.read(build.package_sources())):
            build.find_nvcc()
    except BuildError as error:
        return str(error)
    return None


def state() -> str:
    """In words: which nvcc there is, and whether the kernels are prebuilt, cached or yet to be compiled."""
    try:
        recipe = Recipe.read(build.package_sources())
        if manifest := _fitting(recipe):
            return f"CUDA kernels: prebuilt for {', '.join(map(str, manifest['archs']))} in {PREBUILT}"
        nvcc = build.find_nvcc()
        version = nvcc.version()
        kept = cache.state(_library(recipe, nvcc))
    except BuildError as error:
        return f"CUDA kernels: cannot be compiled: {error}"
    targets = ", ".join(_targets(recipe))
    return f"nvcc: {nvcc.path} (found by {nvcc.found_by}), version {version}, for {targets}\nCUDA kernels: {kept}"


def import_build(folder: Path) -> ModuleType:
    """Import what `build` made in a folder; ValueError if its file is not the one that was compiled."""
    manifest = cache.read_manifest(folder / build.MANIFEST, module=str, sha256=str)
    path = folder / manifest["module"]
    cache.verify(path, manifest)
    return _import(path.name.partition(".")[0], path)


def _import(name: str, path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None  # for a loader there is one
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _prebuilt(recipe: Recipe) -> ModuleType | None:
    """The module of the wheel; None if it has none that fits, or, with a message, if it is damaged."""
    if not _fitting(recipe):
        return None
    try:
        return import_build(PREBUILT)
    except (OSError, ValueError, ImportError) as error:
        cache.say(f"the CUDA kernels in {PREBUILT} are damaged and not used: {error}")
        return None


def _fitting(recipe: Recipe) -> dict | None:
    """The manifest of the wheel's kernels if they are of these sources, for this Python, and run on every card here."""
    try:
        manifest = cache.read_manifest(PREBUILT / build.MANIFEST, sources=str, python=str, archs=list)
    except (OSError, ValueError):
        return None
    same = (manifest["sources"], manifest["python"]) == (recipe.digest(), sysconfig.get_config_var("EXT_SUFFIX"))
    fits = same and all(build.covers(manifest["archs"], capability) for capability in _capabilities())
    return manifest if fits else None


def _library(recipe: Recipe, nvcc: Nvcc) -> cache.Library:
    import pybind11

    version, targets = nvcc.version(), _targets(recipe)
    return cache.Library(
        name=recipe.module,
        words=f"the CUDA kernels for {', '.join(targets)} with nvcc {version}",
        follows_from=(
            __version__,
            recipe.digest(),
            build.compile_flags(recipe, targets),
            version,
            sysconfig.get_config_var("EXT_SUFFIX"),
            pybind11.__version__,
        ),
        compile=lambda folder: folder / build.build(recipe, nvcc, targets, folder)["module"],
        load=functools.partial(_import, recipe.module),
        limit=build.LIMIT,
    )


def _targets(recipe: Recipe) -> tuple[str, ...]:
    """The architectures of the cards present, or without one those of the recipe."""
    return tuple(sorted({build.arch_of(capability) for capability in _capabilities()})) or recipe.archs


def _capabilities() -> list[tuple[int, int]]:
    """Of the cards that can run the kernels; none on a machine without a GPU."""
    found = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    return [capability for capability in found if capability >= (8, 0)]
