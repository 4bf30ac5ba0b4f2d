"""The library of the sweep on a CPU: compiled once and kept, and plain PyTorch with a reason where that cannot be."""

import shlex
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch

from genft_kernels.backends.eager import cpu_pass
from genft_kernels.backends.eager.sweep import elementwise_, sweep
from genft_kernels.backends.eager.update_tile import Others, Update, Wanted
from tests.helpers.cpu_library import needs_compiler

SMALL = Update(torch.ones(9, 1), torch.ones(5, 1), "identity", 0.4, torch.tensor([7]), 1)


def program(path, script):
    """A shell script at `path`, to be run by its name."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def result():
    """The sums over the rows of a small update by whatever there is."""
    return sweep(SMALL, Others(right=SMALL.right), Wanted(others_left=True)).others_left


def expected_result():
    """By plain PyTorch."""
    return elementwise_(SMALL, slice(0, 9), torch.ones(9, 5), None, None).sum(1, keepdim=True)


def assert_compiled():
    torch.testing.assert_close(result(), expected_result())
    assert cpu_pass.state() == "the tiled form on a CPU: compiled"


def assert_plain(reason):
    """Plain PyTorch computes the same, with one warning, in which `reason` is."""
    warning = f"the tiled form takes longer, computed by plain PyTorch: .*{reason}"
    with pytest.warns(UserWarning, match=warning) as told:
        for _ in range(2):
            torch.testing.assert_close(result(), expected_result())
    assert len(told) == 1
    state = cpu_pass.state()
    start = "the tiled form on a CPU: plain PyTorch: "
    assert state.startswith(start) and str(told[0].message).endswith(state[len(start) :])


@needs_compiler
def test_other_sources_or_machines_have_libraries_of_their_own(tmp_path, monkeypatch):
    entry = cpu_pass._library().entry
    shutil.copytree(cpu_pass.package_sources(), tmp_path / "csrc")
    monkeypatch.setattr(cpu_pass, "package_sources", lambda: tmp_path / "csrc")
    assert cpu_pass._library().entry == entry
    for name in cpu_pass._SOURCES:
        content = (tmp_path / "csrc" / name).read_text()
        (tmp_path / "csrc" / name).write_text(f"{content}// another\n")
        assert cpu_pass._library().entry != entry
        (tmp_path / "csrc" / name).write_text(content)
    monkeypatch.setattr("platform.machine", lambda: "another")
    assert cpu_pass._library().entry != entry


@needs_compiler
def test_library_is_compiled_once_and_kept(fresh, monkeypatch):
    assert_compiled()
    kept = sorted(fresh.iterdir())
    cpu_pass._compiled.cache_clear()
    monkeypatch.setattr(subprocess, "Popen", None)  # no second compilation
    assert_compiled()
    assert sorted(fresh.iterdir()) == kept and {path.suffix for path in kept} == {".so", ".json", ".lock"}


@pytest.mark.slow
@needs_compiler
def test_half_a_library_kills_no_process(fresh):
    code = "from genft_kernels.backends.eager import cpu_pass; print(cpu_pass.state())"
    assert_compiled()
    (path,) = fresh.glob("*.so")
    content = path.read_bytes()
    path.unlink()  # this process has it mapped
    path.write_bytes(content[: len(content) // 2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "the tiled form on a CPU: compiled\n"), done.stderr
    assert "is not the file that was compiled" in done.stderr and path.read_bytes()[:4] == content[:4]


@needs_compiler
def test_a_cache_that_cannot_be_used_leaves_it_compiled(fresh, tmp_path, monkeypatch):
    (tmp_path / "cache").touch()  # no folder can be made below a file, not even by root
    monkeypatch.setenv("GENFT_CACHE_DIR", str(tmp_path / "cache" / "below"))
    with pytest.warns(UserWarning, match="compiled the code for the tiled form on a CPU for itself, because") as told:
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
        ("exit 0", r"wrote no cpu_update\.so"),
        ("touch cpu_update.so", "cannot be loaded: .*file too short"),
        ("echo 'int other;' | cc -shared -o cpu_update.so -xc -", "undefined symbol: genft_sweep"),
        ("sleep 300", r"was not done after 0\.5 s"),
    ],
    ids=["fails", "writes nothing", "writes an empty file", "writes another library", "hangs"],
)
def test_a_compiler_that_does_not_do_it_is_heard_once(script, reason, fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", program(tmp_path / "broken-c++", script))
    if script == "sleep 300":
        monkeypatch.setattr(cpu_pass, "_LIMIT", 0.5)
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
