"""The recipe of the CUDA kernels, the search for nvcc, and which cards a build covers."""

import contextlib
from pathlib import Path

import pytest

from genft_kernels.backends.compiled import build
from genft_kernels.backends.compiled.run import BuildError
from tests.helpers.tiny_kernels import NVCC, hide_nvcc, needs_nvcc, write_nvcc, write_tree


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "csrc")


def test_cuda_home_without_nvcc(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(BuildError, match=f"CUDA_HOME is {tmp_path}, but {tmp_path}/bin/nvcc does not exist"):
        build.find_nvcc()


def test_nvcc_is_looked_for_in_order(tmp_path, monkeypatch):
    hide_nvcc(monkeypatch, tmp_path)
    for version in ("cu12", "cu13"):
        write_nvcc(tmp_path / "site" / "nvidia" / version, "")
    spec = build.importlib.machinery.ModuleSpec("nvidia", None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path / "site" / "nvidia"))
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec)
    found = [build.find_nvcc()]
    for place, use in (
        ("system", lambda home: monkeypatch.setattr(build, "SYSTEM_NVCC", home / "bin" / "nvcc")),
        ("path", lambda home: monkeypatch.setenv("PATH", str(home / "bin"))),
        ("home", lambda home: monkeypatch.setenv("CUDA_HOME", str(home))),
    ):
        use(write_nvcc(tmp_path / place, ""))
        found.append(build.find_nvcc())
    assert [nvcc.path.relative_to(tmp_path).parts[:-2] for nvcc in found] == [
        ("site", "nvidia", "cu13"),
        ("system",),
        ("path",),
        ("home",),
    ]
    assert [nvcc.found_by for nvcc in found][1:] == ["the toolkit's usual folder", "PATH", "CUDA_HOME"]


def test_relative_paths_to_nvcc_hold_in_other_folders(tmp_path, monkeypatch):
    hide_nvcc(monkeypatch, tmp_path)
    write_nvcc(tmp_path / "toolkit", "")
    monkeypatch.chdir(tmp_path)
    for variable, value in (("PATH", "toolkit/bin"), ("CUDA_HOME", "toolkit")):
        monkeypatch.setenv(variable, value)
        assert build.find_nvcc() == (tmp_path / "toolkit" / "bin" / "nvcc", variable)


@pytest.mark.parametrize(
    "script, message",
    [
        ("echo hello; exit 0", "does not answer --version as nvcc does: hello"),
        ("echo broken >&2; exit 3", "failed with exit status 3: broken"),
        ("sleep 300", r"was not done after 0\.3 s"),
        ('echo "Cuda compilation tools, release 11.8, V11.8.89"', r"is version 11\.8\.89; .* need 12\.0 or newer"),
        (None, "cannot be run: .*Exec format error"),
    ],
    ids=["another program", "broken", "hanging", "too old", "not a program"],
)
def test_a_wrong_nvcc(script, message, tmp_path, monkeypatch):
    home = write_nvcc(tmp_path / "cuda", script or "")
    if script is None:
        (home / "bin" / "nvcc").write_bytes(b"\x7fELF")
    monkeypatch.setenv("CUDA_HOME", str(home))
    if script == "sleep 300":
        monkeypatch.setattr(build, "ASKING_LIMIT", 0.3)
    with pytest.raises(BuildError, match=message) as failure:
        build.find_nvcc().version()
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
    with pytest.raises(BuildError, match=f"build.txt .*{message}"):
        build.Recipe.read(tree)


def test_no_sources(tmp_path):
    with pytest.raises(BuildError, match=f"the sources of the CUDA kernels are not in {tmp_path}"):
        build.Recipe.read(tmp_path)


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
    assert all(build.covers(archs, card) for card in runs)
    assert not any(build.covers(archs, card) for card in does_not)


def test_python_without_headers(tree, tmp_path, monkeypatch):
    home = write_nvcc(tmp_path / "cuda", 'echo "Cuda compilation tools, release 13.0, V13.0.88"')
    monkeypatch.setattr(build.sysconfig, "get_paths", lambda: {"include": str(tmp_path / "none")})
    with pytest.raises(BuildError, match=rf"Python\.h is not in {tmp_path}/none: install .* python3\.\d+-dev"):
        build.build(build.Recipe.read(tree), build.Nvcc(home / "bin" / "nvcc", "PATH"), ["sm_80"], tmp_path / "build")


def processes_of(path) -> list[bytes]:
    """The commands that run a script; none where the system does not tell."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found.append(file.read_bytes())
    return [command for command in found if str(path).encode() in command]


VERSION = 'case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit;; esac'


@pytest.mark.parametrize(
    "script, message",
    [
        ("echo 'no such flag' >&2; exit 2", r"(?s)failed with exit status \d: .*no such flag"),
        ("exit 0", r"wrote no _tiny\."),
        ("sleep 300", r"was not done after 0\.5 s"),
    ],
    ids=["fails", "writes nothing", "hangs"],
)
def test_an_nvcc_that_does_not_compile(script, message, tree, tmp_path, monkeypatch):
    nvcc = build.Nvcc(write_nvcc(tmp_path / "cuda", f"{VERSION}\n{script}") / "bin" / "nvcc", "PATH")
    if script == "sleep 300":
        monkeypatch.setattr(build, "LIMIT", 0.5)
    with pytest.raises(BuildError, match=message) as failure:
        build.build(build.Recipe.read(tree), nvcc, ["sm_80"], tmp_path / "build")
    assert not processes_of(nvcc.path)
    assert str(failure.value).startswith(f"nvcc 13.0.88 ({nvcc.path}), compiling the CUDA kernels for sm_80, ")


@pytest.mark.slow
@needs_nvcc
def test_strict_builds_fail_on_a_warning(tree, tmp_path):
    (tree / "fill.cu").write_text((tree / "fill.cu").read_text() + "int unused_variable() { int nothing; return 0; }\n")
    recipe = build.Recipe.read(tree)
    build.build(recipe, NVCC, ["sm_80"], tmp_path / "lenient")
    with pytest.raises(BuildError, match="nothing.* was declared but never referenced"):
        build.build(recipe, NVCC, ["sm_80"], tmp_path / "strict", strict=True)
