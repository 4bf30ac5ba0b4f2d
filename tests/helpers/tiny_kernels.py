"""A source tree with one kernel and a binding in plain C, which compiles in a second, and an nvcc that keeps a log."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from genft_kernels.backends.compiled import build
from genft_kernels.backends.compiled.run import BuildError

try:
    NVCC, NO_NVCC = build.find_nvcc(), ""
except BuildError as error:
    NVCC, NO_NVCC = None, str(error)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason=NO_NVCC)

BUILD = """\
module _tiny
binding binding.cpp
kernel fill.cu
arch sm_80
arch compute_80
flag -std=c++17
flag -Xcompiler=-fPIC,-fvisibility=hidden
strict -Werror=all-warnings
strict -Xcompiler=-Wall,-Wextra,-Werror
"""
KERNEL = """\
#include "answer.h"
__global__ void fill(float* out, float value) { out[threadIdx.x] = value; }
const char* launch(float* out) {
    fill<<<1, 32>>>(out, 1.0f);
    return cudaGetErrorString(cudaGetLastError());
}
int answer() { return kAnswer; }
"""
BINDING = """\
#include <Python.h>
const char* launch(float* out);
int answer();
static PyObject* py_launch(PyObject*, PyObject*) { return PyUnicode_FromString(launch(nullptr)); }
static PyObject* py_answer(PyObject*, PyObject*) { return PyLong_FromLong(answer()); }
static PyMethodDef methods[] = {{"launch", py_launch, METH_NOARGS, nullptr},
                                {"answer", py_answer, METH_NOARGS, nullptr},
                                {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_tiny", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__tiny() { return PyModule_Create(&module); }
"""


def write_tree(folder: Path, answer: int = 42) -> Path:
    """Write the sources into `folder`; the module's `answer()` returns `answer`."""
    folder.mkdir(parents=True)
    (folder / "build.txt").write_text(BUILD)
    (folder / "fill.cu").write_text(KERNEL)
    (folder / "binding.cpp").write_text(BINDING)
    (folder / "answer.h").write_text(f"constexpr int kAnswer = {answer};\n")
    return folder


def write_nvcc(home: Path, script: str) -> Path:
    """Write a shell script as `home`/bin/nvcc and return `home`, for CUDA_HOME."""
    path = home / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return home


def write_logging_nvcc(home: Path, nvcc: Path) -> Path:
    """An nvcc that logs its command lines to `home`/log and compiles only once `home`/wait is gone; returns `home`."""
    log, wait = shlex.quote(str(home / "log")), shlex.quote(str(home / "wait"))
    script = f'echo "$@" >> {log}\ncase "$*" in *" -c "*) while [ -e {wait} ]; do sleep 0.05; done;; esac\n'
    return write_nvcc(home, f'{script}exec {shlex.quote(str(nvcc))} "$@"')


def compilations(home: Path) -> int:
    """How often an nvcc of `write_logging_nvcc` compiled the kernel."""
    log = home / "log"
    return sum("-c fill.cu" in line for line in log.read_text().splitlines()) if log.exists() else 0


def hide_nvcc(monkeypatch, tmp_path: Path) -> None:
    """Let no nvcc be found for the time of a test."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "SYSTEM_NVCC", tmp_path / "nvcc")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
