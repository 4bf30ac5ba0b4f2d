"""The CUDA sources compiled by g++ and run on the CPU: one fiber for each CUDA thread (cuda_host.h).

`install()` lets backend "cuda" compute on CPU tensors in this process. The first launch compiles, once for each state
of the sources; processes wait for each other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pybind11
import torch
from filelock import FileLock

from genft_kernels import backends
from genft_kernels.backends.cuda import launch as cuda_launch

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
CSRC, CACHE = ROOT / "csrc", ROOT / "build" / "cuda_host"  # tests/faults/cuda_faults.py has others
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fno-strict-aliasing"]  # warnings are nvcc's to give


def unavailable_reason() -> str | None:
    """Why the sources cannot be compiled for the CPU here, or None."""
    if shutil.which("g++") is None:
        return "there is no g++ to run its kernels on the CPU"
    if cuda_headers() is None:
        return "there are no CUDA headers to run its kernels on the CPU (set CUDA_HOME)"
    return None


@functools.cache
def cuda_headers() -> pathlib.Path | None:
    """The folder of cuda_bf16.h."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and pathlib.Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    for home in filter(None, homes):
        if (pathlib.Path(home) / "include" / "cuda_bf16.h").is_file():
            return pathlib.Path(home) / "include"
    return None


def build(*sources: pathlib.Path) -> pathlib.Path:
    """A shared library of `sources`. The cache keeps what has been compiled, by its text and the headers' folders."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"), ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _object(source), [*sources, HERE / "buffers.cpp"]))
        state = _digest(*(path.name.encode() for path in objects))
        return _made(CACHE / state / f"genft_cuda{sysconfig.get_config_var('EXT_SUFFIX')}", "-shared", *objects)


def _object(source: pathlib.Path) -> pathlib.Path:
    folders = cuda_headers(), pybind11.get_include(), sysconfig.get_paths()["include"]
    flags = [*FLAGS, *(f"-isystem{folder}" for folder in folders)]
    texts = [path.read_bytes() for path in _with_includes(source)]
    target = CACHE / f"{source.name}.{_digest(repr(flags).encode(), *texts)}.o"
    return _made(target, "-x", "c++", *flags, f"-I{CSRC}", f"-I{HERE}", "-c", source)


def _with_includes(source: pathlib.Path) -> list[pathlib.Path]:
    """The file and all that it includes from the project, directly or not."""
    found = [source]
    for path in found:
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            header = next(folder / name for folder in (CSRC, HERE) if (folder / name).is_file())
            if header not in found:
                found.append(header)
    return found


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _made(target: pathlib.Path, *arguments) -> pathlib.Path:
    """`target`, made by g++ unless it is there; nobody sees half of it."""
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        unfinished = target.with_name(f"{target.name}.{os.getpid()}")
        result = subprocess.run(["g++", *arguments, "-o", unfinished], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"g++ failed on the CUDA sources:\n{result.stderr[-3000:]}")
        unfinished.rename(target)
    return target


class Emulator:
    """A compiled module, and launches that may touch their own tensors only."""

    def __init__(self, path: pathlib.Path):
        loader = importlib.machinery.ExtensionFileLoader("genft_cuda", str(path))
        self.module: ModuleType = importlib.util.module_from_spec(importlib.util.spec_from_loader("genft_cuda", loader))
        loader.exec_module(self.module)
        self._memory = ctypes.CDLL(str(path))

    def start(self, kernel: str, arguments: tuple) -> None:
        """`cuda_launch.start` on CPU tensors."""
        self._memory.cuda_host_forget_buffers()
        for tensor in cuda_launch.tensors_of(arguments):
            begin, elements = tensor.data_ptr(), _extent(tensor)
            self._memory.cuda_host_register_buffer(
                ctypes.c_void_p(begin), ctypes.c_size_t(elements * tensor.element_size())
            )
        no_stream = 0
        code = getattr(self.module, kernel)(*map(cuda_launch.encoded, arguments), no_stream)
        cuda_launch.raise_for(code, kernel, self.module)


def _extent(tensor: torch.Tensor) -> int:
    """Elements from the first to the last one, those between rows included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@functools.cache
def emulator() -> Emulator:
    """The one of the project's sources."""
    return Emulator(build(*sorted(CSRC.glob("*.cu")), CSRC / "bindings.cpp"))


def install() -> None:
    """Let backend "cuda" compute on CPU tensors in this process; those of a CUDA device still go there."""
    start_there, reason_there = cuda_launch.start, backends._device_reason

    def start(device: torch.device, kernel: str, arguments: tuple) -> None:
        if device.type == "cpu":
            emulator().start(kernel, arguments)
        else:
            start_there(device, kernel, arguments)

    cuda_launch.start = start
    backends._device_reason = lambda name, device: (
        unavailable_reason() if (name, device.type) == ("cuda", "cpu") else reason_there(name, device)
    )
