"""The C++ sources: the header draws the words of the Python module, and a kernel compiles for a card."""

import dataclasses
import pathlib
import shutil
import subprocess

import pytest
import torch

from genft_kernels import philox
from genft_kernels.backends.compiled import build
from tests.helpers.tiny_kernels import NVCC, needs_nvcc

ROOT = pathlib.Path(__file__).parents[2]
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def philox_words(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler on this machine")
    program = tmp_path_factory.mktemp("csrc") / "philox_words"
    source = ROOT / "tests" / "backends" / "philox_words.cpp"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([COMPILER, *flags, source, "-o", program], check=True)
    return program


@pytest.mark.parametrize("stream, seed", [(0, 0), (1, 2**63 + 5), (2, 2**40 + 1)])
def test_header_and_module_agree(philox_words, stream, seed):
    in_features, out_features, p = 13, 10, 0.25
    arguments = [str(v) for v in (in_features, out_features, stream, seed, int(p * 2**32))]
    output = subprocess.run([philox_words, *arguments], check=True, capture_output=True, text=True).stdout
    found = torch.tensor([[int(v) for v in line.split()] for line in output.splitlines()])
    found = found.view(in_features, out_features, 2)
    key = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    counters = torch.arange(in_features)[:, None] * -(-out_features // 4) + torch.arange(out_features) // 4
    words = philox.words(counters.reshape(-1), key, stream).view(in_features, out_features, 4)
    words = words.gather(2, (torch.arange(out_features) % 4).expand(in_features, -1)[..., None]).squeeze(2)
    assert torch.equal(found[..., 0], words)
    keep = philox.keep_mask(key, stream, in_features, out_features, p).t()
    assert torch.equal(found[..., 1].bool(), keep)


@needs_nvcc
def test_kernel_compiles_for_a_card_without_a_warning(tmp_path):
    """One source for one card; tests/benchmarks/test_cuda_report.py compiles all of them for all."""
    recipe = dataclasses.replace(build.Recipe.read(ROOT / "csrc"), kernels=("fold.cu",))
    manifest = build.build(recipe, NVCC, ["sm_90a"], tmp_path / "build", strict=True)
    assert (tmp_path / "build" / manifest["module"]).is_file()
