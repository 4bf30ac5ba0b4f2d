"""All CUDA sources compile for sm_80 and sm_90a without a warning and without a spill, and load without a GPU."""

import pathlib
import re
import subprocess
import sys

import pytest
import torch

from benchmarks.compiled import cuda_report
from genft_kernels.backends.compiled import build
from tests.helpers.tiny_kernels import needs_nvcc, write_tree

ROOT = pathlib.Path(__file__).parents[2]
# Each launcher of genft.h once, with null pointers and the first of each choice.
LAUNCH_EVERYTHING = r"""
import pathlib, re, sys
from genft_kernels.backends.cuda import extension
from genft_kernels.backends.cuda.launch import raise_for

header = re.sub(r"//.*", "", pathlib.Path("csrc/genft.h").read_text())
structures = dict(re.findall(r"^struct (\w+) \{(.*?)^\};", header, re.MULTILINE | re.DOTALL))

def value(parameter):
    kind, name = parameter.strip().rsplit(maxsplit=1)
    if (structure := re.fullmatch(r"(?:const )?(\w+)&?", kind)) and structure[1] in structures:
        return tuple(value(field) for field in fields_of(structures[structure[1]]))
    if "*" in kind:
        return [0] if kind.endswith("const*") else 0
    choice = kind == "bool" or name in ("dtype", "activation", "stream")
    return 0 if choice else 0.5 if kind == "float" else 1 if name == "layers" else 64

def fields_of(text):
    for declaration in filter(None, map(str.strip, text.split(";"))):
        kind, name = declaration.split(",")[0].rsplit(maxsplit=1)
        yield from (f"{kind} {each.strip()}" for each in (name, *declaration.split(",")[1:]))

kernels = extension.import_build(pathlib.Path(sys.argv[1]))
for name, parameters in re.findall(r"^int (\w+)\(([^)]*)\);", header, re.MULTILINE):
    try:
        raise_for(getattr(kernels, name)(*map(value, parameters.split(","))), name, kernels)
    except RuntimeError as error:
        print(name, error, sep="|")
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The folder of a build of csrc/, and the rows of its kernels."""
    folder = tmp_path_factory.mktemp("kernels") / "build"
    return folder, cuda_report.compile_verbosely(folder)


@needs_nvcc
@pytest.mark.slow
def test_every_source_compiles_without_warnings_spills_or_too_much_shared_memory(compiled):
    _, rows = compiled
    listed = set(build.Recipe.read(cuda_report.SOURCES).kernels)
    for target in ("sm_80", "sm_90a"):
        assert {row["source"] for row in rows if row["target"] == target} == listed
    assert not [(row["kernel"], fault) for row in rows for fault in cuda_report.faults(row)]
    assert all(row["registers"] > 0 for row in rows)


def test_every_source_is_in_the_recipe():
    recipe = build.Recipe.read(cuda_report.SOURCES)
    of_the_cpu = "cpu_update.cpp"  # genft_kernels/backends/eager/cpu_pass.py compiles it
    listed = {*recipe.kernels, recipe.binding, of_the_cpu}
    assert listed == {name for name in recipe.files if name.endswith((".cu", ".cpp"))}
    assert {"sm_80", "sm_90a", "compute_80"} == set(recipe.archs)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_module_imports_and_a_launch_without_a_gpu_is_an_error(compiled):
    # In a process of its own: this one has the same kernels for the CPU, under the same names.
    command = [sys.executable, "-c", LAUNCH_EVERYTHING, str(compiled[0])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    messages = dict(line.split("|", 1) for line in done.stdout.splitlines())
    launchers = re.findall(r"^int (\w+)\(", (ROOT / "csrc" / "genft.h").read_text(), re.MULTILINE)
    assert done.returncode == 0 and set(messages) == set(launchers), done.stderr
    for name, message in messages.items():
        assert re.match(f"CUDA kernel '{name}' failed to launch: .*(driver|no CUDA-capable device)", message), message


@needs_nvcc
def test_a_spill_is_a_fault(tmp_path):
    tree = write_tree(tmp_path / "csrc")
    # Each of 1024 threads keeps 128 numbers, and has 32 registers.
    (tree / "fill.cu").write_text(
        (tree / "fill.cu").read_text()
        + """
__global__ void __launch_bounds__(1024, 2) greedy(float* data) {
    float kept[128];
    for (int i = 0; i < 128; ++i) kept[i] = data[i * 1024 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 128; ++i) data[i * 1024 + threadIdx.x] = kept[i] * kept[127 - i];
}
"""
    )
    (tree / "build.txt").write_text((tree / "build.txt").read_text() + "flag -Xptxas=-v\n")
    build.build(build.Recipe.read(tree), build.find_nvcc(), ["sm_80"], tmp_path / "build")
    rows = list(cuda_report.rows_of((tmp_path / "build" / build.LOG).read_text()))
    found = {row["kernel"]: list(cuda_report.faults(row)) for row in rows}
    assert found["fill"] == [] and found["greedy"][0].endswith("bytes of spills")


def test_static_shared_memory_is_a_fault():
    row = {"spill_stores": 0, "spill_loads": 0, "static_shared": 0}
    assert list(cuda_report.faults(row)) == []
    assert list(cuda_report.faults(row | {"static_shared": 16})) == ["16 bytes of static shared memory"]
