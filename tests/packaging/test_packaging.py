"""Wheels with and without compiled kernels, and the CMake build; on a source tree with one small kernel."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.tiny_kernels import NVCC, needs_nvcc, write_tree

ROOT = Path(__file__).parents[2]
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake on this machine")


@pytest.fixture
def project(tmp_path):
    """A copy of the project around the small kernel."""
    folder = tmp_path / "project"
    write_tree(folder / "csrc")
    shutil.copy(ROOT / "csrc" / "philox.h", folder / "csrc")
    for name in (
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
        "CMakeLists.txt",
        "tests/backends/philox_words.cpp",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(
        ROOT / "genft_kernels", folder / "genft_kernels", ignore=shutil.ignore_patterns("prebuilt", "*.pyc")
    )
    return folder


def run(*command, cwd, **environment):
    """Run a command; its standard output and error, and exit status."""
    environment = {**os.environ, "PYTHONPATH": "", **environment}
    return subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def make_wheel(project, **environment):
    """The wheel and pip's output; the wheel is None if there is none."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", "dist", "."]
    made = run(*command, cwd=project, **environment)
    return next((project / "dist").glob("*.whl"), None), made.stdout


def test_a_plain_wheel_is_pure_and_carries_the_sources(project):
    wheel, output = make_wheel(project)
    assert wheel is not None, output
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    wanted = {f"genft_kernels/csrc/{name}" for name in ("build.txt", "fill.cu", "binding.cpp", "answer.h")}
    wanted |= {str(path.relative_to(project)) for path in project.glob("genft_kernels/**/*.py")}
    assert wanted <= set(names)
    assert not [name for name in names if "prebuilt" in name]


@pytest.mark.slow
@needs_nvcc
def test_a_wheel_with_compiled_kernels_needs_no_compiler(project, tmp_path):
    wheel, output = make_wheel(project, GENFT_PREBUILD="1")
    assert wheel is not None, output
    assert re.search(r"-cp\d+-cp\d+-linux_\w+\.whl$", wheel.name)
    inside = {name.split("/")[-1] for name in zipfile.ZipFile(wheel).namelist() if "prebuilt" in name}
    assert len(inside) == 2 and "manifest.json" in inside
    site = tmp_path / "site"
    installed = run(sys.executable, "-m", "pip", "install", "--no-deps", "-t", str(site), str(wheel), cwd=tmp_path)
    assert installed.returncode == 0, installed.stdout
    script = (
        "from genft_kernels.backends.cuda import extension as e; m = e.load(); print(m.answer(), m.launch(), e.state())"
    )
    nowhere = {"CUDA_HOME": str(tmp_path), "GENFT_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(site)}
    used = run(sys.executable, "-c", script, cwd=tmp_path, **nowhere)
    assert re.match(r"42 .*CUDA kernels: prebuilt for sm_80, compute_80 in ", used.stdout), used.stdout
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"GENFT_PREBUILD": "yes"}, "GENFT_PREBUILD must be 0 or 1; got 'yes'"),
        ({"GENFT_PREBUILD": "1", "CUDA_HOME": "/nowhere"}, "CUDA_HOME is /nowhere, but /nowhere/bin/nvcc does not"),
    ],
)
def test_a_wheel_that_cannot_be_made_says_why(environment, message, project):
    wheel, output = make_wheel(project, **environment)
    assert wheel is None and message in output


def cmake(project, *options):
    configured = run("cmake", "-S", str(project), "-B", "build", *options, cwd=project)
    assert configured.returncode == 0, configured.stdout
    built = run("cmake", "--build", "build", cwd=project)
    return built.returncode, built.stdout


@needs_cmake
def test_cmake_without_cuda_gives_the_headers(project):
    code, output = cmake(project, "-DGENFT_CUDA=OFF")
    assert code == 0, output
    words = run("build/philox_words", "1", "4", "0", "7", "0", cwd=project).stdout
    assert len(words.splitlines()) == 4 and "libgenft" not in output


CONSUMER = {
    "CMakeLists.txt": """\
cmake_minimum_required(VERSION 3.24)
project(consumer LANGUAGES CXX)
add_subdirectory(project)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE genft::genft)
""",
    "main.cpp": """\
#include <cstdio>
#include "answer.h"
#include "philox.h"
int answer();
const char* launch(float*);
int main() { std::printf("%d %d %s", answer(), kAnswer, launch(nullptr)); }
""",
}


@needs_nvcc
@needs_cmake
def test_cmake_links_the_kernels_into_a_c_plus_plus_program(project):
    for name, content in CONSUMER.items():
        (project.parent / name).write_text(content)
    code, output = cmake(project.parent, f"-DCMAKE_CUDA_COMPILER={NVCC.path}", "-DCMAKE_VERBOSE_MAKEFILE=ON")
    assert code == 0, output
    assert run("build/consumer", cwd=project.parent).stdout.startswith("42 42 ")
    (compilation,) = [line for line in output.splitlines() if "fill.cu" in line and " -c " in line]
    for flag in ("-Xcompiler=-fPIC,-fvisibility=hidden", "arch=compute_80,code=[sm_80]", "code=[compute_80]"):
        assert flag in compilation.replace('"', ""), flag
    assert "-Werror" not in compilation, "a warning of a user's newer compiler must not stop the build"


@pytest.mark.slow
@needs_nvcc
@needs_cmake
def test_cmake_of_the_project_itself_fails_on_a_warning(project):
    (project / "csrc" / "fill.cu").write_text("void warned() { int nothing; }\n")
    code, output = cmake(project, f"-DCMAKE_CUDA_COMPILER={NVCC.path}")
    assert code != 0 and "nothing" in output
