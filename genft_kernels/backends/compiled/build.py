"""How the CUDA kernels are compiled: for their first use, for wheels (setup.py) and for the report of registers.

The recipe (`csrc/build.txt`) is shared with CMakeLists.txt.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import sysconfig
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .run import BuildError, run

MANIFEST, LOG = "manifest.json", "build.log"
OLDEST_NVCC = (12, 0)  # the first that knows sm_90a and C++17 in device code as these sources use it
SYSTEM_NVCC = Path("/usr/local/cuda/bin/nvcc")
INSTALL_HINT = "install the CUDA toolkit, or pip install 'genft_kernels[nvcc]'"
SOURCE_SUFFIXES = (".cu", ".cuh", ".cpp", ".h", ".txt")
ASKING_LIMIT, LIMIT = 60, 1800  # seconds: for nvcc to tell its version, and to compile everything


def package_sources() -> Path:
    """The folder `csrc` of the installed package, or of the source tree."""
    package = Path(__file__).parents[2]
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


@dataclass(frozen=True)
class Recipe:
    """The lines of `build.txt`, and the bytes of the files beside it: what is hashed is what is compiled."""

    module: str
    binding: str
    kernels: tuple[str, ...]
    archs: tuple[str, ...]
    flags: tuple[str, ...]
    strict_flags: tuple[str, ...]
    files: dict[str, bytes]

    @classmethod
    def read(cls, folder: Path) -> Recipe:
        """Read the folder; BuildError if `build.txt` is missing or has a line that means nothing."""
        try:
            files = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in SOURCE_SUFFIXES}
            lines = files["build.txt"].decode().splitlines()
        except (OSError, KeyError) as error:
            raise BuildError(f"the sources of the CUDA kernels are not in {folder}: {error}") from error
        found: dict[str, list[str]] = {key: [] for key in ("module", "binding", "kernel", "arch", "flag", "strict")}
        for line in lines:
            if line.strip() and not line.startswith("#"):
                key, _, value = line.partition(" ")
                if key not in found or not value.strip():
                    raise BuildError(f"{folder / 'build.txt'} has a line that means nothing: {line!r}")
                found[key].append(value.strip())
        if len(found["module"]) != 1 or len(found["binding"]) != 1:
            raise BuildError(f"{folder / 'build.txt'} must name one module and one binding")
        if missing := {*found["kernel"], *found["binding"]} - set(files):
            raise BuildError(f"{folder / 'build.txt'} names {', '.join(sorted(missing))}, which does not exist")
        (module,), (binding,) = found["module"], found["binding"]
        kernels, archs, flags, strict = (tuple(found[key]) for key in ("kernel", "arch", "flag", "strict"))
        return cls(module, binding, kernels, archs, flags, strict, files)

    def digest(self) -> str:
        """SHA-256 of all sources, headers and flags."""
        return hashlib.sha256(repr(self.files).encode()).hexdigest()


class Nvcc(NamedTuple):
    """The compiler: where it is and what led to it."""

    path: Path
    found_by: str

    def version(self) -> str:
        """Such as "13.0.88"; BuildError if it does not run, is no nvcc or is too old."""
        where = f"nvcc at {self.path} (found by {self.found_by})"
        answer = run(where, [self.path, "--version"], ASKING_LIMIT)
        match = re.search(r"release (\d+)\.(\d+), V([\d.]+)", answer)
        if not match:
            raise BuildError(f"{where} does not answer --version as nvcc does: {answer.strip() or '(no output)'}")
        if (int(match[1]), int(match[2])) < OLDEST_NVCC:
            oldest = ".".join(map(str, OLDEST_NVCC))
            raise BuildError(f"{where} is version {match[3]}; the CUDA kernels need {oldest} or newer: {INSTALL_HINT}")
        return match[3]


def find_nvcc() -> Nvcc:
    """By CUDA_HOME, then PATH, then the toolkit's usual folder, then the pip package; BuildError if there is none."""
    if home := os.environ.get("CUDA_HOME"):
        path = Path(home).absolute() / "bin" / "nvcc"
        if not path.is_file():
            raise BuildError(f"CUDA_HOME is {home}, but {path} does not exist")
        return Nvcc(path, "CUDA_HOME")
    if on_path := shutil.which("nvcc"):
        return Nvcc(Path(on_path).absolute(), "PATH")
    if SYSTEM_NVCC.is_file():
        return Nvcc(SYSTEM_NVCC, "the toolkit's usual folder")
    packages = importlib.util.find_spec("nvidia")
    for folder in (packages and packages.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True):
            return Nvcc(path, "the pip package nvidia-cuda-nvcc")
    raise BuildError(
        f"no nvcc: CUDA_HOME is not set, none is on PATH, in {SYSTEM_NVCC.parent} or from pip: {INSTALL_HINT}"
    )


def arch_of(capability: tuple[int, int]) -> str:
    """The architecture to compile for a card; Hopper's own instructions need the "a"."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if capability == (9, 0) else "")


def covers(archs: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether a card runs code for one of `archs`: its own, an older one of its generation, or any older PTX."""
    for arch in archs:
        if not (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)(a?)", str(arch))):
            continue
        kind, major, minor, specific = found.groups()
        version = (int(major), int(minor))
        if version == capability or not specific and version < capability and kind == "compute":
            return True
        if not specific and version[0] == capability[0] and version <= capability:
            return True
    return False


def compile_flags(recipe: Recipe, archs: Sequence[str], strict: bool = False) -> list[str]:
    """Flags of nvcc for every source and for the link."""
    targets = [f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}" for arch in archs]
    return [*recipe.flags, *(recipe.strict_flags if strict else ()), *targets]


def build(recipe: Recipe, nvcc: Nvcc, archs: Sequence[str], output: Path, strict: bool = False) -> dict:
    """Compile and link the extension into the new folder `output`, beside the compiler's log and a manifest.

    The manifest, which is returned: `module` (file name), `sha256`, `sources` (digest), `archs`, `nvcc` (version),
    `python` (suffix of its extensions), `seconds`.

    Raises:
        BuildError: the compiler failed; with its last lines.
    """
    start, version, suffix = time.perf_counter(), nvcc.version(), sysconfig.get_config_var("EXT_SUFFIX")
    work, target = output / "work", f"{recipe.module}{suffix}"
    work.mkdir(parents=True)
    for name, content in recipe.files.items():
        (work / name).write_bytes(content)
    (work / "build.ninja").write_text(_ninja_file(recipe, nvcc, compile_flags(recipe, archs, strict), target))
    import ninja

    who = f"nvcc {version} ({nvcc.path}), compiling the CUDA kernels for {', '.join(archs)},"
    (output / LOG).write_text(run(who, [Path(ninja.BIN_DIR) / "ninja"], LIMIT, work))
    if not (work / target).is_file():
        raise BuildError(f"{who} wrote no {target}")
    shutil.move(work / target, output / target)
    shutil.rmtree(work)
    manifest = {
        "module": target,
        "sha256": hashlib.sha256((output / target).read_bytes()).hexdigest(),
        "sources": recipe.digest(),
        "archs": list(archs),
        "nvcc": version,
        "python": suffix,
        "seconds": round(time.perf_counter() - start, 1),
    }
    (output / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _python_headers() -> str:
    """The folder of Python.h, which systems may keep in a package of its own; BuildError if it is not there."""
    folder = sysconfig.get_paths()["include"]
    if not (Path(folder) / "Python.h").is_file():
        package = f"python{sysconfig.get_python_version()}-dev"
        raise BuildError(f"Python.h is not in {folder}: install Python's headers (on Debian and Ubuntu {package})")
    return folder


def _ninja_file(recipe: Recipe, nvcc: Nvcc, flags: list[str], target: str) -> str:
    import pybind11

    headers = ["-isystem", pybind11.get_include(), "-isystem", _python_headers()]
    compiler = shlex.join([str(nvcc.path), *flags]).replace("$", "$$")
    objects = {f"{name}.o": name for name in (*recipe.kernels, recipe.binding)}
    lines = [
        "rule compile",
        f"  command = {compiler} $headers -c $in -o $out",
        "rule link",
        f"  command = {compiler} -shared -cudart static $in -o $out",
        *(f"build {obj}: compile {source}" for obj, source in objects.items()),
        f"  headers = {shlex.join(headers).replace('$', '$$')}",  # of the last one, the binding
        f"build {target}: link {' '.join(objects)}",
    ]
    return "\n".join(lines) + "\n"
