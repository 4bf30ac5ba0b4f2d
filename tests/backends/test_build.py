"""The recipe of the CUDA kernels, the search for nvcc, and which cards a build covers."""

import pytest

from genft_kernels.backends import _build
from tests.helpers.tiny_kernels import NVCC, hide_nvcc, needs_nvcc, write_nvcc, write_tree


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "csrc")


def test_cuda_home_without_nvcc(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(_build.BuildError, match=f"CUDA_HOME is {tmp_path}, but {tmp_path}/bin/nvcc does not exist"):
        _build.find_nvcc()


def test_nvcc_is_looked_for_in_order(tmp_path, monkeypatch):
    hide_nvcc(monkeypatch, tmp_path)
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
def test_a_wrong_nvcc(script, message, tmp_path, monkeypatch):
    home = write_nvcc(tmp_path / "cuda", script or "")
    if script is None:
        (home / "bin" / "nvcc").write_bytes(b"\x7fELF")
    monkeypatch.setenv("CUDA_HOME", str(home))
    with pytest.raises(_build.BuildError, match=message) as failure:
        _build.find_nvcc().version()
    assert f"nvcc at {home}/bin/nvcc (found by CUDA_HOME)" in str(failure.value)


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
        _build.Recipe.read(tree)


def test_no_sources(tmp_path):
    with pytest.raises(_build.BuildError, match=f"the sources of the CUDA kernels are not in {tmp_path}"):
        _build.Recipe.read(tmp_path)


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


def test_python_without_headers(tree, tmp_path, monkeypatch):
    home = write_nvcc(tmp_path / "cuda", 'echo "Cuda compilation tools, release 13.0, V13.0.88"')
    monkeypatch.setattr(_build.sysconfig, "get_paths", lambda: {"include": str(tmp_path / "none")})
    with pytest.raises(_build.BuildError, match=rf"Python\.h is not in {tmp_path}/none: install .* python3\.\d+-dev"):
        _build.build(
            _build.Recipe.read(tree), _build.Nvcc(home / "bin" / "nvcc", "PATH"), ["sm_80"], tmp_path / "build"
        )


@needs_nvcc
def test_strict_builds_fail_on_a_warning(tree, tmp_path):
    (tree / "fill.cu").write_text((tree / "fill.cu").read_text() + "int unused_variable() { int nothing; return 0; }\n")
    recipe = _build.Recipe.read(tree)
    _build.build(recipe, NVCC, ["sm_80"], tmp_path / "lenient")
    with pytest.raises(_build.BuildError, match="nothing.* was declared but never referenced"):
        _build.build(recipe, NVCC, ["sm_80"], tmp_path / "strict", strict=True)
