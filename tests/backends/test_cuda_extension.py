"""The CUDA kernels' extension module: compiled on first use, cached, or the wheel's. No GPU is needed."""

import json
from pathlib import Path

import pytest

from genft_kernels.backends.compiled import build
from genft_kernels.backends.compiled.run import BuildError
from genft_kernels.backends.cuda import extension
from tests.helpers.tiny_kernels import (
    NVCC,
    compilations,
    hide_nvcc,
    needs_nvcc,
    write_logging_nvcc,
    write_nvcc,
    write_tree,
)


def forget():
    """As a new process begins."""
    extension._outcome.cache_clear()
    extension.unavailable_reason.cache_clear()


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No module or failure remembered, no card, no build in the package."""
    monkeypatch.setattr(extension, "_capabilities", lambda: [])
    monkeypatch.setattr(extension, "PREBUILT", Path("/nonexistent"))
    forget()
    yield
    forget()


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


def entries(cache):
    return list(cache.glob("*.so"))


@needs_nvcc
def test_first_use_compiles_and_the_second_finds_it(tree, cache, home, capsys):
    module = extension.load(tree)
    assert module.answer() == 42 and module.launch() != "no error"
    told = capsys.readouterr().err
    assert "compiling the CUDA kernels for sm_80, compute_80 with nvcc" in told and str(cache) in told
    assert " compiled the CUDA kernels for sm_80" in told
    assert extension.load(tree) is module
    forget()
    assert extension.load(tree).answer() == 42 and compilations(home) == 1
    assert capsys.readouterr().err == ""
    assert not list(cache.glob("*.building")) and len(entries(cache)) == 1


@needs_nvcc
def test_compiles_for_the_cards_present(tree, cache, home, monkeypatch):
    monkeypatch.setattr(extension, "_capabilities", lambda: [(9, 0), (8, 6), (9, 0)])
    extension.load(tree)
    log = (home / "log").read_text()
    assert "code=sm_86" in log and "code=sm_90a" in log and "code=sm_80" not in log


@needs_nvcc
@pytest.mark.parametrize("what", ["header", "flags", "package", "cards", "pybind11", "python", "nvcc"])
def test_a_stale_build_is_not_used(what, tree, cache, home, monkeypatch):
    key = extension._library(build.Recipe.read(tree), build.find_nvcc()).entry
    if what == "header":
        (tree / "answer.h").write_text("constexpr int kAnswer = 43;\n")
    elif what == "flags":
        (tree / "build.txt").write_text((tree / "build.txt").read_text() + "flag -lineinfo\n")
    elif what == "package":
        monkeypatch.setattr(extension, "__version__", "99")
    elif what == "cards":
        monkeypatch.setattr(extension, "_capabilities", lambda: [(8, 0)])
    elif what == "pybind11":
        monkeypatch.setattr("pybind11.__version__", "99")
    elif what == "python":
        monkeypatch.setattr(extension.sysconfig, "get_config_var", lambda name: ".cpython-399.so")
    else:
        monkeypatch.setattr(build.Nvcc, "version", lambda self: "99.9")
    assert extension._library(build.Recipe.read(tree), build.find_nvcc()).entry != key


@pytest.mark.slow
@needs_nvcc
def test_a_compile_error_shows_the_compilers_words_and_is_remembered(tree, cache, home):
    (tree / "fill.cu").write_text("int answer() { return no_such_name; }\n")
    for _ in range(2):  # the second time without a compiler
        with pytest.raises(BuildError, match=r"(?s)failed with exit status.*fill\.cu.*no_such_name.* is undefined"):
            extension.load(tree)
        assert compilations(home) == 1
    assert not entries(cache) and not list(cache.glob("*.building"))
    forget()
    with pytest.raises(BuildError, match="no_such_name"):
        extension.load(tree)
    assert compilations(home) == 2
    write_tree(tree.parent / "mended")
    assert extension.load(tree.parent / "mended").answer() == 42


@needs_nvcc
def test_a_module_that_does_not_load_is_an_error(tree, cache, home):
    (tree / "fill.cu").write_text("const char* launch(float*) { return nullptr; }\n")
    with pytest.raises(BuildError, match="undefined symbol: .*answer"):
        extension.load(tree)


def test_a_wrong_nvcc_leaves_nothing_in_the_cache(tree, tmp_path, cache, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(write_nvcc(tmp_path / "cuda", "echo hello")))
    for _ in range(2):
        with pytest.raises(BuildError, match="nvcc at .* does not answer --version as nvcc does"):
            extension.load(tree)
    assert not cache.exists()


def test_no_nvcc(tree, tmp_path, cache, monkeypatch):
    hide_nvcc(monkeypatch, tmp_path)
    monkeypatch.setattr(build, "package_sources", lambda: tree)
    with pytest.raises(BuildError, match=r"no nvcc: CUDA_HOME is not set, .*pip install 'genft_kernels\[nvcc\]'"):
        extension.load(tree)
    assert "no nvcc" in extension.unavailable_reason() and "no nvcc" in extension.state()


@pytest.mark.slow
@needs_nvcc
def test_kernels_of_the_wheel_come_first_where_they_fit(tree, tmp_path, cache, home, capsys, monkeypatch):
    prebuilt = tmp_path / "prebuilt"
    build.build(build.Recipe.read(tree), NVCC, ["sm_80"], prebuilt)
    monkeypatch.setattr(extension, "PREBUILT", prebuilt)
    monkeypatch.setattr(build, "package_sources", lambda: tree)
    monkeypatch.setattr(extension, "_capabilities", lambda: [(8, 6)])
    assert extension.load().answer() == 42 and compilations(home) == 0
    assert extension.state() == f"CUDA kernels: prebuilt for sm_80 in {prebuilt}"
    # A card that they do not cover; then other sources; then a damaged file.
    monkeypatch.setattr(extension, "_capabilities", lambda: [(8, 6), (9, 0)])
    forget()
    assert extension.load().answer() == 42 and compilations(home) == 1
    monkeypatch.setattr(extension, "_capabilities", lambda: [(8, 6)])
    header = (tree / "answer.h").read_text()
    (tree / "answer.h").write_text("constexpr int kAnswer = 43;\n")
    forget()
    assert extension.load().answer() == 43 and compilations(home) == 2
    (tree / "answer.h").write_text(header)
    (module,) = prebuilt.glob("*.so")
    module.unlink()
    module.write_bytes(b"")
    forget()
    assert extension.load().answer() == 42 and compilations(home) == 3
    assert f"{prebuilt} are damaged and not used" in capsys.readouterr().err


def test_kernels_of_the_wheel_need_no_nvcc(tree, tmp_path, monkeypatch):
    recipe = build.Recipe.read(tree)
    suffix = extension.sysconfig.get_config_var("EXT_SUFFIX")
    manifest = {"sources": recipe.digest(), "python": suffix, "archs": ["compute_80"]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    hide_nvcc(monkeypatch, tmp_path)
    monkeypatch.setattr(extension, "PREBUILT", tmp_path)
    monkeypatch.setattr(build, "package_sources", lambda: tree)
    assert extension.unavailable_reason() is None
    extension.unavailable_reason.cache_clear()
    monkeypatch.setattr(extension, "_capabilities", lambda: [(8, 0), (9, 0)])
    assert extension.unavailable_reason() is None


@pytest.mark.parametrize(
    "change",
    [
        "null",
        "[]",
        "[" * 200_000,
        '{"module": ',
        {"archs": None},
        {"archs": [None, 5, "sm_x"]},
        {"python": []},
        {"sources": None},
    ],
    ids=lambda change: str(change)[:20],
)
def test_a_damaged_manifest_of_the_wheel_is_as_none(change, tree, tmp_path, monkeypatch):
    suffix = extension.sysconfig.get_config_var("EXT_SUFFIX")
    manifest = {"sources": build.Recipe.read(tree).digest(), "python": suffix, "archs": ["compute_80"]}
    text = change if isinstance(change, str) else json.dumps({**manifest, **change})
    (tmp_path / "manifest.json").write_text(text)
    hide_nvcc(monkeypatch, tmp_path)
    monkeypatch.setattr(extension, "PREBUILT", tmp_path)
    monkeypatch.setattr(extension, "_capabilities", lambda: [(8, 0)])
    monkeypatch.setattr(build, "package_sources", lambda: tree)
    assert "no nvcc" in extension.unavailable_reason() and "no nvcc" in extension.state()
    with pytest.raises(BuildError, match="no nvcc"):
        extension.load()


@needs_nvcc
def test_the_state_is_told_without_compiling(tree, cache, home, monkeypatch):
    monkeypatch.setattr(build, "package_sources", lambda: tree)
    found, kernels = extension.state().splitlines()
    assert found.startswith(f"nvcc: {home}/bin/nvcc (found by CUDA_HOME), version ")
    assert found.endswith(", for sm_80, compute_80")
    assert kernels == f"CUDA kernels: compiled on first use, kept in {cache}"
    assert extension.unavailable_reason() is None
    assert compilations(home) == 0 and not cache.exists()
    extension.load()
    assert extension.state().endswith(f"kernels: cached in {entries(cache)[0]}")
