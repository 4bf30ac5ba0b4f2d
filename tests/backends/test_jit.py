"""Compiling the CUDA kernels on first use: the cache, and everything that can go wrong. No GPU is needed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from genft_kernels.backends import _build, _jit
from tests.helpers.tiny_kernels import (
    NVCC,
    compilations,
    hide_nvcc,
    needs_nvcc,
    write_logging_nvcc,
    write_nvcc,
    write_tree,
)

PATIENCE = 240  # seconds; other work may share the machine


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No module or failure remembered, no card, no build in the package."""
    monkeypatch.setattr(_jit, "_loaded", {})
    monkeypatch.setattr(_jit, "_failures", {})
    monkeypatch.setattr(_jit, "_capabilities", lambda: [])
    monkeypatch.setattr(_jit, "PREBUILT", Path("/nonexistent"))
    _jit.unavailable_reason.cache_clear()
    yield
    _jit.unavailable_reason.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache with a space"
    monkeypatch.setenv("GENFT_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """CUDA_HOME with an nvcc that counts its calls."""
    folder = write_logging_nvcc(tmp_path / "cuda", NVCC.path)
    monkeypatch.setenv("CUDA_HOME", str(folder))
    return folder


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "csrc")


def forget():
    """As a new process begins."""
    _jit._loaded.clear()
    _jit._failures.clear()


def entries(cache):
    return [path.parent for path in cache.glob("*/manifest.json")]


@needs_nvcc
def test_first_use_compiles_and_the_second_finds_it(tree, cache, home, capsys):
    module = _jit.load(tree)
    assert module.answer() == 42 and module.launch() != "no error"
    told = capsys.readouterr().err
    assert "compiling the CUDA kernels for sm_80, compute_80 with nvcc" in told and str(cache) in told
    assert "compiled the CUDA kernels in " in told
    assert _jit.load(tree) is module
    forget()
    assert _jit.load(tree).answer() == 42 and compilations(home) == 1
    assert capsys.readouterr().err == ""
    assert not list(cache.glob("*.building")) and len(entries(cache)) == 1
    manifest = json.loads((entries(cache)[0] / "manifest.json").read_text())
    assert manifest["archs"] == ["sm_80", "compute_80"] and manifest["seconds"] > 0


@needs_nvcc
def test_compiles_for_the_cards_present(tree, cache, home, monkeypatch):
    monkeypatch.setattr(_jit, "_capabilities", lambda: [(9, 0), (8, 6), (9, 0)])
    _jit.load(tree)
    log = (home / "log").read_text()
    assert "code=sm_86" in log and "code=sm_90a" in log and "code=sm_80" not in log


@needs_nvcc
@pytest.mark.parametrize("what", ["header", "flags", "package", "cards", "pybind11", "python", "nvcc"])
def test_a_stale_build_is_not_used(what, tree, cache, home, monkeypatch):
    key = _jit._plan(_build.Recipe.read(tree)).key
    if what == "header":
        (tree / "answer.h").write_text("constexpr int kAnswer = 43;\n")
    elif what == "flags":
        (tree / "build.txt").write_text((tree / "build.txt").read_text() + "flag -lineinfo\n")
    elif what == "package":
        monkeypatch.setattr(_jit, "__version__", "99")
    elif what == "cards":
        monkeypatch.setattr(_jit, "_capabilities", lambda: [(8, 0)])
    elif what == "pybind11":
        monkeypatch.setattr("pybind11.__version__", "99")
    elif what == "python":
        monkeypatch.setattr(_jit.sysconfig, "get_config_var", lambda name: ".cpython-399.so")
    else:
        monkeypatch.setattr(_build.Nvcc, "version", lambda self: "99.9")
    assert _jit._plan(_build.Recipe.read(tree)).key != key


@needs_nvcc
def test_changed_sources_are_compiled_anew(tree, cache, home):
    assert _jit.load(tree).answer() == 42
    (tree / "answer.h").write_text("constexpr int kAnswer = 43;\n")
    forget()
    assert _jit.load(tree).answer() == 43 and compilations(home) == 2


@needs_nvcc
@pytest.mark.parametrize("damage", ["truncated", "altered", "no module", "manifest"])
def test_a_damaged_build_is_compiled_anew(damage, tree, cache, home, capsys):
    _jit.load(tree)
    (entry,) = entries(cache)
    (module,) = entry.glob("*.so")
    # A new file, because this process has the old one mapped.
    content = module.read_bytes()
    module.unlink()
    if damage == "truncated":
        module.write_bytes(content[: len(content) // 2])
    elif damage == "altered":
        module.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "manifest":
        module.write_bytes(content)
        (entry / "manifest.json").write_text('{"module": ')
    forget()
    assert _jit.load(tree).answer() == 42 and compilations(home) == 2
    assert "damaged" in capsys.readouterr().err
    forget()
    assert _jit.load(tree).answer() == 42 and compilations(home) == 2


USER = (
    "import sys, pathlib; from genft_kernels.backends import _jit; print(_jit.load(pathlib.Path(sys.argv[1])).answer())"
)


@contextlib.contextmanager
def users(tree, count):
    """Processes of their own that load the module and print its answer; at the end nothing of them is left."""
    command = [sys.executable, "-c", USER, str(tree)]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    processes = [subprocess.Popen(command, cwd=Path(__file__).parents[2], **options) for _ in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the compilers it started as well
            process.communicate()


@needs_nvcc
def test_of_two_processes_one_compiles_and_one_waits(tree, cache, home):
    (home / "wait").touch()
    with users(tree, 2) as processes:
        first = {process: process.stderr.readline() for process in processes}
        (waiting,) = [p for p, line in first.items() if "another process compiles the CUDA kernels; waiting" in line]
        (home / "wait").unlink()
        for process in processes:
            out, err = process.communicate(timeout=PATIENCE)
            assert (out, process.returncode) == ("42\n", 0), err
            assert ("compiled the CUDA kernels in" in err) == (process is not waiting)
    assert compilations(home) == 1


@needs_nvcc
def test_a_killed_build_is_swept_away_by_the_next(tree, cache, home):
    (home / "wait").touch()
    with users(tree, 1) as (killed,):
        deadline = time.monotonic() + PATIENCE
        while compilations(home) == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        killed.kill()
        killed.wait()
        assert list(cache.glob("*.building")) and not entries(cache)
        (home / "wait").unlink()  # its compiler, left alone, goes on as well
        assert _jit.load(tree).answer() == 42 and compilations(home) == 2
    assert not list(cache.glob("*.building")) and len(entries(cache)) == 1


@needs_nvcc
def test_a_cache_folder_of_ones_own_that_cannot_be_written_is_an_error(tree, tmp_path, home, monkeypatch):
    (tmp_path / "file").touch()  # no folder can be made below a file, not even by root
    monkeypatch.setenv("GENFT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(_build.BuildError, match="GENFT_CACHE_DIR: cannot keep compiled kernels in .*file/cache"):
        _jit.load(tree)
    assert compilations(home) == 0


@needs_nvcc
def test_without_a_writable_cache_folder_a_process_compiles_its_own(tree, tmp_path, home, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.delenv("GENFT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.warns(UserWarning, match="cannot be kept in .*set GENFT_CACHE_DIR to a folder that can be written"):
        assert _jit.load(tree).answer() == 42
    assert not list(tmp_path.glob("genft_kernels-*")), "the temporary folder is left behind"


def test_a_cache_folder_of_ones_own_asks_nobody_for_the_users(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "platformdirs", None)  # importing it is an error
    assert _jit.cache_folder() == cache


@needs_nvcc
def test_a_cache_that_can_only_be_read_serves_what_it_has(tree, cache, home, monkeypatch):
    _jit.load(tree)
    forget()
    monkeypatch.setattr(_jit, "_compile_into", None)  # neither lock nor folder is touched
    assert _jit.load(tree).answer() == 42


@pytest.mark.parametrize("value", ["", "relative/folder", __file__])
def test_a_bad_cache_folder_names_the_variable(value, tree, tmp_path, monkeypatch):
    home = write_nvcc(tmp_path / "cuda", 'echo "Cuda compilation tools, release 13.0, V13.0.88"')
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("GENFT_CACHE_DIR", value)
    with pytest.raises(_build.BuildError, match=f"GENFT_CACHE_DIR must be .*; got {value!r}"):
        _jit.load(tree)


@needs_nvcc
def test_a_compile_error_shows_the_compilers_words_and_is_remembered(tree, cache, home):
    (tree / "fill.cu").write_text("int answer() { return no_such_name; }\n")
    for _ in range(2):  # the second time without a compiler
        with pytest.raises(_build.BuildError, match=r"(?s)could not compile.*fill\.cu.*no_such_name.* is undefined"):
            _jit.load(tree)
        assert compilations(home) == 1
    assert not entries(cache) and not list(cache.glob("*.building"))
    forget()
    with pytest.raises(_build.BuildError, match="no_such_name"):
        _jit.load(tree)
    assert compilations(home) == 2
    write_tree(tree.parent / "mended")
    assert _jit.load(tree.parent / "mended").answer() == 42


@needs_nvcc
def test_a_module_that_does_not_load_is_an_error(tree, cache, home):
    (tree / "fill.cu").write_text("const char* launch(float*) { return nullptr; }\n")
    with pytest.raises(_build.BuildError, match="undefined symbol: .*answer"):
        _jit.load(tree)


def test_a_wrong_nvcc_leaves_nothing_in_the_cache(tree, tmp_path, cache, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(write_nvcc(tmp_path / "cuda", "echo hello")))
    for _ in range(2):
        with pytest.raises(_build.BuildError, match="nvcc at .* does not answer --version as nvcc does"):
            _jit.load(tree)
    assert not cache.exists()


def test_no_nvcc(tree, tmp_path, cache, monkeypatch):
    hide_nvcc(monkeypatch, tmp_path)
    monkeypatch.setattr(_jit, "package_sources", lambda: tree)
    with pytest.raises(
        _build.BuildError, match=r"no nvcc: CUDA_HOME is not set, .*pip install 'genft_kernels\[nvcc\]'"
    ):
        _jit.load(tree)
    assert "no nvcc" in _jit.unavailable_reason() and "no nvcc" in _jit.state()


@needs_nvcc
def test_kernels_of_the_wheel_come_first_where_they_fit(tree, tmp_path, cache, home, capsys, monkeypatch):
    prebuilt = tmp_path / "prebuilt"
    _build.build(_build.Recipe.read(tree), NVCC, ["sm_80"], prebuilt)
    monkeypatch.setattr(_jit, "PREBUILT", prebuilt)
    monkeypatch.setattr(_jit, "package_sources", lambda: tree)
    monkeypatch.setattr(_jit, "_capabilities", lambda: [(8, 6)])
    assert _jit.load().answer() == 42 and compilations(home) == 0
    assert _jit.state() == f"CUDA kernels: prebuilt for sm_80 in {prebuilt}"
    # A card that they do not cover; then other sources; then a damaged file.
    monkeypatch.setattr(_jit, "_capabilities", lambda: [(8, 6), (9, 0)])
    forget()
    assert _jit.load().answer() == 42 and compilations(home) == 1
    monkeypatch.setattr(_jit, "_capabilities", lambda: [(8, 6)])
    header = (tree / "answer.h").read_text()
    (tree / "answer.h").write_text("constexpr int kAnswer = 43;\n")
    forget()
    assert _jit.load().answer() == 43 and compilations(home) == 2
    (tree / "answer.h").write_text(header)
    (module,) = prebuilt.glob("*.so")
    module.unlink()
    module.write_bytes(b"")
    forget()
    assert _jit.load().answer() == 42 and compilations(home) == 3
    assert f"{prebuilt} are damaged and not used" in capsys.readouterr().err


def test_kernels_of_the_wheel_need_no_nvcc(tree, tmp_path, monkeypatch):
    recipe = _build.Recipe.read(tree)
    suffix = _jit.sysconfig.get_config_var("EXT_SUFFIX")
    manifest = {"sources": recipe.digest(), "python": suffix, "archs": ["compute_80"]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    hide_nvcc(monkeypatch, tmp_path)
    monkeypatch.setattr(_jit, "PREBUILT", tmp_path)
    monkeypatch.setattr(_jit, "package_sources", lambda: tree)
    assert _jit.unavailable_reason() is None
    _jit.unavailable_reason.cache_clear()
    monkeypatch.setattr(_jit, "_capabilities", lambda: [(8, 0), (9, 0)])
    assert _jit.unavailable_reason() is None


@needs_nvcc
def test_the_state_is_told_without_compiling(tree, cache, home, monkeypatch):
    monkeypatch.setattr(_jit, "package_sources", lambda: tree)
    assert _jit.state().startswith(f"nvcc: {home}/bin/nvcc (found by CUDA_HOME), version ")
    assert _jit.state().endswith("CUDA kernels: compiled on first use for sm_80, compute_80")
    assert _jit.unavailable_reason() is None
    assert compilations(home) == 0 and not cache.exists()
    _jit.load()
    assert _jit.state().endswith(f"kernels: cached in {entries(cache)[0]}")
