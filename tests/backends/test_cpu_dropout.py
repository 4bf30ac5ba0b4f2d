"""Dropout on a CPU by compiled code: the numbers of plain PyTorch, and what happens without a compiler or a cache."""

import ctypes
import os
import shutil
import stat
import subprocess

import pytest
import torch

from genft_kernels import philox
from genft_kernels.backends.eager import dropout as cpu_dropout
from genft_kernels.backends.eager.dropout import dropout_factors

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
CALL = torch.tensor([7]), philox.ROW_STREAM, 5, 9, 0.4, slice(None), torch.float32


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing loaded, and an empty cache."""
    monkeypatch.setenv("GENFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    cpu_dropout._library.cache_clear()
    yield tmp_path / "cache"
    cpu_dropout._library.cache_clear()


def plain(seed, stream, in_features, out_features, dropout, rows, dtype):
    keep = philox.keep_mask(seed, stream, in_features, out_features, dropout, rows)
    return keep.to(dtype) * torch.tensor(1 / (1 - dropout), dtype=dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "in_features, out_features, rows",
    [
        (1, 1, slice(None)),
        (63, 5, slice(None)),
        (64, 8, slice(4, 8)),
        (200, 301, slice(100, 301)),
        (129, 700, slice(None)),  # two threads
        (3, 2**34, slice(2**34 - 8, 2**34)),  # counters beyond 32 bits
        (7, 0, slice(None)),
    ],
)
def test_the_numbers_are_those_of_plain_pytorch(in_features, out_features, rows, dtype):
    for seed, stream, dropout in ((0, 0, 0.1), (2**63 - 1, 1, 0.999), (-(2**63) + 5, 1, 0.5), (-1, 0, 0.0)):
        call = torch.tensor([seed]), stream, in_features, out_features, dropout, rows, dtype
        actual, expected = dropout_factors(*call), plain(*call)
        assert actual.dtype == dtype and actual.shape == expected.shape and torch.equal(actual, expected)


def test_rows_start_with_a_block():
    with pytest.raises(ValueError, match="rows must start at a multiple of 4, got 2"):
        dropout_factors(*CALL[:5], slice(2, 9), torch.float32)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_share_the_rows_without_a_seam(threads, monkeypatch):
    monkeypatch.setattr(cpu_dropout, "_BLOCKS_OF_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for out_features in (1, 4, 13, 40):
        call = torch.tensor([3]), 1, 70, out_features, 0.3, slice(None), torch.float32
        assert torch.equal(dropout_factors(*call), plain(*call))


@needs_compiler
def test_it_is_compiled_once_and_kept(fresh, monkeypatch):
    assert torch.equal(dropout_factors(*CALL), plain(*CALL)) and cpu_dropout.state() == "dropout on a CPU: compiled"
    (kept,) = fresh.iterdir()
    cpu_dropout._library.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)  # no second compilation
    assert torch.equal(dropout_factors(*CALL), plain(*CALL))
    assert isinstance(cpu_dropout._library(), ctypes.CDLL) and list(fresh.iterdir()) == [kept]


@needs_compiler
def test_a_damaged_library_is_compiled_anew(fresh):
    dropout_factors(*CALL)
    (kept,) = fresh.iterdir()
    kept.unlink()
    kept.write_bytes(b"half of a libr")
    cpu_dropout._library.cache_clear()
    assert torch.equal(dropout_factors(*CALL), plain(*CALL)) and isinstance(cpu_dropout._library(), ctypes.CDLL)


@needs_compiler
def test_without_a_cache_that_can_be_written_a_process_compiles_its_own(fresh, tmp_path, monkeypatch):
    (tmp_path / "cache").touch()  # no folder can be made below a file, not even by root
    monkeypatch.delenv("GENFT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert torch.equal(dropout_factors(*CALL), plain(*CALL)) and isinstance(cpu_dropout._library(), ctypes.CDLL)


def test_without_a_compiler_plain_pytorch_draws_the_same_numbers(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert torch.equal(dropout_factors(*CALL), plain(*CALL))
    assert cpu_dropout.state().endswith("plain PyTorch: there is no C++ compiler: no-such-compiler is not found")
    assert not fresh.exists()


def test_a_compiler_that_fails_is_heard_once(fresh, tmp_path, monkeypatch):
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'error: no such standard' >&2\nexit 3\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.warns(UserWarning, match="broken-c.. failed: error: no such standard") as heard:
        assert torch.equal(dropout_factors(*CALL), plain(*CALL))
        assert torch.equal(dropout_factors(*CALL), plain(*CALL))
    assert len(heard) == 1 and "no such standard" in cpu_dropout.state()
    assert not list(fresh.iterdir()), os.listdir(fresh)


def test_other_devices_draw_on_themselves():
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    factors = dropout_factors(seed, *CALL[1:])
    assert factors.device.type == "meta" and factors.shape == (9, 5)
