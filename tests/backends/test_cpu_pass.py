"""Dropout on a CPU by compiled code: the numbers of plain PyTorch, and what happens without a compiler or a cache."""

import shlex
import shutil
import subprocess
import sys
import tempfile

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
    cpu_dropout._compiled.cache_clear()
    yield tmp_path / "cache"
    cpu_dropout._compiled.cache_clear()


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
def test_numbers_are_those_of_plain_pytorch(in_features, out_features, rows, dtype):
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


def program(path, script):
    """A shell script at `path`, to be run by its name."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def assert_compiled():
    assert torch.equal(dropout_factors(*CALL), plain(*CALL)) and cpu_dropout.state() == "dropout on a CPU: compiled"


def assert_plain(reason):
    """Plain PyTorch draws the same numbers, with one warning, in which `reason` is."""
    with pytest.warns(
        UserWarning, match=f"dropout takes eight times as long, drawn by plain PyTorch: .*{reason}"
    ) as told:
        for _ in range(2):
            assert torch.equal(dropout_factors(*CALL), plain(*CALL))
    assert len(told) == 1
    state = cpu_dropout.state()
    assert state.startswith("dropout on a CPU: plain PyTorch: ") and str(told[0].message).endswith(state[33:])


@needs_compiler
def test_library_is_compiled_once_and_kept(fresh, monkeypatch):
    assert_compiled()
    kept = sorted(fresh.iterdir())
    cpu_dropout._compiled.cache_clear()
    monkeypatch.setattr(subprocess, "Popen", None)  # no second compilation
    assert_compiled()
    assert sorted(fresh.iterdir()) == kept and {path.suffix for path in kept} == {".so", ".json", ".lock"}


@pytest.mark.slow
@needs_compiler
def test_half_a_library_kills_no_process(fresh):
    code = (
        "import torch; from genft_kernels.backends.eager import dropout as d;"
        "d.dropout_factors(torch.tensor([7]), 1, 5, 9, 0.4, slice(None), torch.float32); print(d.state())"
    )
    assert_compiled()
    (path,) = fresh.glob("*.so")
    content = path.read_bytes()
    path.unlink()  # this process has it mapped
    path.write_bytes(content[: len(content) // 2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "dropout on a CPU: compiled\n"), done.stderr
    assert "is not the file that was compiled" in done.stderr and path.read_bytes()[:4] == content[:4]


@needs_compiler
def test_a_cache_that_cannot_be_used_leaves_it_compiled(fresh, tmp_path, monkeypatch):
    (tmp_path / "cache").touch()  # no folder can be made below a file, not even by root
    monkeypatch.setenv("GENFT_CACHE_DIR", str(tmp_path / "cache" / "below"))
    with pytest.warns(UserWarning, match="compiled the code for dropout on a CPU for itself, because") as told:
        assert_compiled()
    assert len(told) == 1


@needs_compiler
@pytest.mark.parametrize("command", ["ccache c++", "'c c ache' c++ -g1"])
def test_the_compiler_may_have_arguments(command, fresh, tmp_path, monkeypatch):
    name = shlex.split(command)[0]
    program(tmp_path / name, f'echo "$@" > {tmp_path}/log; exec "$@"')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CXX", command)
    assert_compiled()
    assert (tmp_path / "log").read_text().startswith(" ".join(shlex.split(command)[1:]) + " -std=c++17 ")


@pytest.mark.parametrize(
    "script, reason",
    [
        ("echo 'error: no such standard' >&2; exit 3", "failed with exit status 3: error: no such standard"),
        ("exit 0", r"wrote no dropout\.so"),
        ("touch dropout.so", "cannot be loaded: .*file too short"),
        ("echo 'int other;' | cc -shared -o dropout.so -xc -", "undefined symbol: genft_dropout_factors"),
        ("sleep 300", r"was not done after 0\.5 s"),
    ],
    ids=["fails", "writes nothing", "writes an empty file", "writes another library", "hangs"],
)
def test_a_compiler_that_does_not_do_it_is_heard_once(script, reason, fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", program(tmp_path / "broken-c++", script))
    if script == "sleep 300":
        monkeypatch.setattr(cpu_dropout, "_LIMIT", 0.5)
    assert_plain(reason)
    assert not list(fresh.glob("*.building"))


@pytest.mark.parametrize(
    "command, reason",
    [
        ("no-such-compiler -m64", "there is no C.. compiler: no-such-compiler is not found"),
        ("'c++", r"CXX is no command: No closing quotation"),
    ],
)
def test_no_compiler_is_heard_once(command, reason, fresh, monkeypatch):
    monkeypatch.setenv("CXX", command)
    assert_plain(reason)
    assert not fresh.exists()


@needs_compiler
def test_no_place_to_compile_is_heard_once(fresh, monkeypatch):
    def user_cache_dir(*names, **options):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("GENFT_CACHE_DIR")
    monkeypatch.setattr("platformdirs.user_cache_dir", user_cache_dir)
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    assert_plain("this user has no home folder; .*/nonexistent")


def test_a_bad_cache_folder_is_heard_once(fresh, monkeypatch):
    monkeypatch.setenv("GENFT_CACHE_DIR", "relative")
    assert_plain("GENFT_CACHE_DIR must be the absolute path of a folder; got 'relative'")


def test_devices_draw_on_themselves():
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    factors = dropout_factors(seed, *CALL[1:])
    assert factors.device.type == "meta" and factors.shape == (9, 5)
