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
from tiny_kernels import NVCC, compilations, needs_nvcc, write_logging_nvcc, write_nvcc, write_tree

from genft_kernels.backends import _build, _jit

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
    processes = [subprocess.Popen(command, cwd=Path(__file__).parent.parent, **options) for _ in range(count)]
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


@needs_nvcc
def test_strict_builds_fail_on_a_warning(tree, tmp_path):
    (tree / "fill.cu").write_text((tree / "fill.cu").read_text() + "int unused_variable() { int nothing; return 0; }\n")
    recipe = _build.Recipe.read(tree)
    _build.build(recipe, NVCC, ["sm_80"], tmp_path / "lenient")
    with pytest.raises(_build.BuildError, match="nothing.* was declared but never referenced"):
        _build.build(recipe, NVCC, ["sm_80"], tmp_path / "strict", strict=True)


def without_nvcc(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(_build, "SYSTEM_NVCC", tmp_path / "nvcc")
    monkeypatch.setattr(_build.importlib.util, "find_spec", lambda name: None)


def test_no_nvcc(tree, tmp_path, cache, monkeypatch):
    without_nvcc(monkeypatch, tmp_path)
    monkeypatch.setattr(_jit, "_package_sources", lambda: tree)
    with pytest.raises(
        _build.BuildError, match=r"no nvcc: CUDA_HOME is not set, .*pip install 'genft_kernels\[nvcc\]'"
    ):
        _jit.load(tree)
    assert "no nvcc" in _jit.unavailable_reason() and "no nvcc" in _jit.state()


def test_cuda_home_without_nvcc(tree, tmp_path, cache, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(_build.BuildError, match=f"CUDA_HOME is {tmp_path}, but {tmp_path}/bin/nvcc does not exist"):
        _jit.load(tree)


def test_nvcc_is_looked_for_in_order(tmp_path, monkeypatch):
    without_nvcc(monkeypatch, tmp_path)
    for version in ("cu12", "cu13"):
        write_nvcc(tmp_path / "site" / "nvidia" / version, "")
    spec = _build.importlib.machinery.ModuleSpec("nvidia", None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path / "site" / "nvidia"))
    monkeypatch.setattr(_build.importlib.util, "find_spec", lambda name: spec)
    found = [_build.find_nvcc()]
    for place, use in (
        ("system", lambda home: monkeypatch.setattr(_build, "SYSTEM_NVCC", home / "bin" / "nvcc")),
        ("path", lambda home: monkeypatch.setenv("PATH", str(home / "bin"))),
        ("home", lambda home: monkeypatch.setenv("CUDA_HOME", str(home))),
    ):
        use(write_nvcc(tmp_path / place, ""))
        found.append(_build.find_nvcc())
    assert [nvcc.path.relative_to(tmp_path).parts[:-2] for nvcc in found] == [
        ("site", "nvidia", "cu13"),
        ("system",),
        ("path",),
        ("home",),
    ]
    assert [nvcc.found_by for nvcc in found][1:] == ["the toolkit's usual folder", "PATH", "CUDA_HOME"]


@pytest.mark.parametrize(
    "script, message",
    [
        ("echo hello; exit 0", "does not answer --version as nvcc does; exit status 0, output:\nhello"),
        ("echo broken >&2; exit 3", "exit status 3, output:\nbroken"),
        ('echo "Cuda compilation tools, release 11.8, V11.8.89"', r"is version 11\.8\.89; .* need 12\.0 or newer"),
        (None, "cannot be run: .*Exec format error"),
    ],
    ids=["another program", "broken", "too old", "not a program"],
)
def test_a_wrong_nvcc(script, message, tree, cache, tmp_path, monkeypatch):
    home = write_nvcc(tmp_path / "cuda", script or "")
    if script is None:
        (home / "bin" / "nvcc").write_bytes(b"\x7fELF")
    monkeypatch.setenv("CUDA_HOME", str(home))
    with pytest.raises(_build.BuildError, match=message) as failure:
        _jit.load(tree)
    assert f"nvcc at {home}/bin/nvcc (found by CUDA_HOME)" in str(failure.value)
    assert not cache.exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text + "speed -O9\n", "means nothing: 'speed -O9'"),
        (lambda text: text + "kernel\n", "means nothing: 'kernel'"),
        (lambda text: text + "kernel no.cu\n", "names no.cu, which does not exist"),
        (lambda text: text.replace("module _tiny\n", ""), "must name one module and one binding"),
    ],
)
def test_a_bad_recipe_names_the_line(change, message, tree):
    (tree / "build.txt").write_text(change((tree / "build.txt").read_text()))
    with pytest.raises(_build.BuildError, match=f"build.txt .*{message}"):
        _jit.load(tree)


def test_no_sources(tmp_path):
    with pytest.raises(_build.BuildError, match=f"the sources of the CUDA kernels are not in {tmp_path}"):
        _jit.load(tmp_path)


@pytest.mark.parametrize(
    "archs, runs, does_not",
    [
        (["sm_80"], [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        (["sm_90a"], [(9, 0)], [(8, 0), (10, 0)]),
        (["sm_90a", "compute_80"], [(8, 0), (9, 0), (10, 3), (12, 0)], [(7, 5)]),
        (["sm_100a"], [(10, 0)], [(10, 3), (9, 0)]),
        (["compute_90a"], [(9, 0)], [(10, 0)]),
        ([], [], [(8, 0)]),
    ],
)
def test_which_cards_a_build_covers(archs, runs, does_not):
    assert all(_build.covers(archs, card) for card in runs)
    assert not any(_build.covers(archs, card) for card in does_not)


@needs_nvcc
def test_kernels_of_the_wheel_come_first_where_they_fit(tree, tmp_path, cache, home, capsys, monkeypatch):
    prebuilt = tmp_path / "prebuilt"
    _build.build(_build.Recipe.read(tree), NVCC, ["sm_80"], prebuilt)
    monkeypatch.setattr(_jit, "PREBUILT", prebuilt)
    monkeypatch.setattr(_jit, "_package_sources", lambda: tree)
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
    without_nvcc(monkeypatch, tmp_path)
    monkeypatch.setattr(_jit, "PREBUILT", tmp_path)
    monkeypatch.setattr(_jit, "_package_sources", lambda: tree)
    assert _jit.unavailable_reason() is None
    _jit.unavailable_reason.cache_clear()
    monkeypatch.setattr(_jit, "_capabilities", lambda: [(8, 0), (9, 0)])
    assert _jit.unavailable_reason() is None


@needs_nvcc
def test_the_state_is_told_without_compiling(tree, cache, home, monkeypatch):
    monkeypatch.setattr(_jit, "_package_sources", lambda: tree)
    assert _jit.state().startswith(f"nvcc: {home}/bin/nvcc (found by CUDA_HOME), version ")
    assert _jit.state().endswith("CUDA kernels: compiled on first use for sm_80, compute_80")
    assert _jit.unavailable_reason() is None
    assert compilations(home) == 0 and not cache.exists()
    _jit.load()
    assert _jit.state().endswith(f"kernels: cached in {entries(cache)[0]}")
