"""One pass over a CPU's tile by compiled code: the numbers of plain PyTorch, and what happens without a compiler."""

import itertools
import shlex
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch

from genft_kernels import philox
from genft_kernels.activations import ACTIVATIONS
from genft_kernels.backends.eager import cpu_pass
from genft_kernels.backends.eager.fold import Folding
from genft_kernels.backends.eager.rounding import round_stochastically
from genft_kernels.backends.eager.update_tile import Update, UpdateTile
from genft_kernels.functional import genft_linear
from tests.helpers.cases import case_of, make_data, relative_error, run

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (columns, rows, those of the tile): odd sizes, two threads, counters beyond 32 bits, nothing at all.
SHAPES = [
    (1, 1, slice(0, 1)),
    (63, 5, slice(0, 5)),
    (64, 8, slice(4, 8)),
    (200, 301, slice(100, 301)),
    (129, 700, slice(0, 700)),
    (3, 2**34, slice(2**34 - 8, 2**34)),
    (7, 0, slice(0, 0)),
]


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing loaded, and an empty cache."""
    monkeypatch.setenv("GENFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    cpu_pass._compiled.cache_clear()
    yield tmp_path / "cache"
    cpu_pass._compiled.cache_clear()


def tile_of(pre, activation, dropout=0.0, seed=7, stream=1, rows=None, all_rows=None):
    """A tile of an update whose left right^T is `pre`."""
    all_rows = pre.shape[0] if all_rows is None else all_rows
    left, right = pre.new_zeros(1, 1).expand(all_rows, 1), pre.new_zeros(pre.shape[1], 1)
    update = Update(left, right, activation, dropout, torch.tensor([seed]), stream)
    return UpdateTile(update, rows or slice(0, pre.shape[0]), pre)


def evaluated(tile, grad=None, value=True, folding=None, plain=False):
    """(U, the gradient of left right^T, the folded rows), by compiled code or by plain PyTorch."""
    tile, grad = tile._replace(pre=tile.pre.clone()), None if grad is None else grad.clone()
    folding = folding and folding._replace(out=torch.full_like(folding.out, torch.nan))
    if plain:
        tile._plain(grad, value, folding)
    else:
        assert cpu_pass.run(tile, grad, value, folding)
    return tile.pre, grad, folding and folding.out


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found, expected, dtype):
    """Equal but for a few roundings of numbers about 1."""
    error = (found.double() - expected.double()).abs()
    assert (error <= 8 * torch.finfo(dtype).eps * (1 + expected.double().abs())).all()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns, all_rows, rows", SHAPES)
def test_masks_are_those_of_plain_pytorch(columns, all_rows, rows, dtype):
    for seed, stream, dropout in ((0, 0, 0.1), (2**63 - 1, 1, 0.999), (-(2**63) + 5, 1, 0.5)):
        one = torch.ones(rows.stop - rows.start, columns, dtype=dtype)
        u, p, _ = evaluated(tile_of(one, "identity", dropout, seed, stream, rows, all_rows), one)
        keep = philox.keep_mask(torch.tensor([seed]), stream, columns, all_rows, dropout, rows)
        assert torch.equal(u != 0, keep) and torch.equal(p != 0, keep)
        assert torch.equal(u, (keep.double() / (1 - dropout)).to(dtype)) and torch.equal(p, u)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_numbers_are_those_of_plain_pytorch(activation, dropout, dtype):
    pre, grad, weight = (random(203, 130, dtype=dtype, seed=seed) for seed in range(3))
    tile, folding = tile_of(pre, activation, dropout), Folding(weight, 0.3, torch.empty_like(weight))
    u, p, folded = evaluated(tile, grad, folding=folding)
    for found, expected in zip((u, p, folded), evaluated(tile, grad, folding=folding, plain=True), strict=True):
        assert_near(found, expected, dtype)
    if dtype.itemsize > 2 and activation in ("identity", "relu", "leaky_relu"):
        assert torch.equal(u, evaluated(tile, plain=True)[0])
        assert torch.equal(p, evaluated(tile, grad, plain=True)[1])


@needs_compiler
def test_what_is_not_wanted_is_not_written():
    pre, grad, weight = (random(9, 70, seed=seed) for seed in range(3))
    tile, folding = tile_of(pre, "gelu", 0.2), Folding(weight, 0.3, torch.empty_like(weight))
    u, p, folded = evaluated(tile, grad, folding=folding)
    for wants_grad, value, folds in itertools.product((False, True), repeat=3):
        found = evaluated(tile, grad if wants_grad else None, value, folding if folds else None)
        assert torch.equal(found[0], u if value else pre)
        assert torch.equal(found[1], p) if wants_grad else found[1] is None
        assert torch.equal(found[2], folded) if folds else found[2] is None


@needs_compiler
@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_is_at_most_twice_plain_pytorchs(activation, dtype, scale):
    pre, grad = random(301, 500, dtype=dtype) * scale, random(301, 500, dtype=dtype, seed=1)
    tile, exact = tile_of(pre, activation, 0.1), tile_of(pre.double(), activation, 0.1)
    results = evaluated(tile, grad), evaluated(tile, grad, plain=True), evaluated(exact, grad.double(), plain=True)
    for found, plain, true in zip(*(each[:2] for each in results), strict=True):
        error, of_plain = ((each.double() - true).norm() / true.norm() for each in (found, plain))
        assert error <= 2 * of_plain + torch.finfo(dtype).eps / 32


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_read_and_rounded_to_nearest(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    u, p, _ = evaluated(tile_of(every, "identity"), every)
    for found in (u, p):
        assert torch.equal(found.isnan(), every.isnan())
        assert torch.equal(found.nan_to_num(0.0).view(torch.int16), every.nan_to_num(0.0).view(torch.int16))
    for dropout in (0.1, 1 / 3, 0.5, 1 - 2**-9):  # subnormal ones, ties and infinities among what is rounded
        u, _, _ = evaluated(tile_of(every, "identity", dropout))
        keep = philox.keep_mask(torch.tensor([7]), 1, 256, 256, dropout)
        expected = (every.float() * (keep * torch.tensor(1 / (1 - dropout)))).to(dtype)
        assert torch.equal(u.isnan(), expected.isnan()) and torch.equal(u.nan_to_num(0.0), expected.nan_to_num(0.0))


@needs_compiler
@pytest.mark.parametrize("seed", [0, 5, -3, 2**20 - 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_folded_rows_have_the_bits_of_stochastic_rounding(dtype, seed):
    pre, weight = random(40, 77, dtype=dtype) * 1e-3, random(40, 77, dtype=dtype, seed=1)
    for rows in (slice(0, 40), slice(8, 13)):
        folding = Folding(weight, 0.5, torch.empty_like(weight))
        *_, folded = evaluated(tile_of(pre[rows], "identity", seed=seed, rows=rows, all_rows=40), folding=folding)
        expected = torch.empty_like(weight)
        round_stochastically(weight.float() + 0.5 * pre.float(), torch.tensor([seed]), expected)
        assert torch.equal(folded[rows], expected[rows]) and folded[rows.stop :].isnan().all()
        *_, plain = evaluated(
            tile_of(pre[rows], "identity", seed=seed, rows=rows, all_rows=40), None, True, folding, True
        )
        assert torch.equal(plain[rows], expected[rows])


@needs_compiler
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_are_those_of_plain_pytorch(dtype, activation):
    pre = torch.tensor([[0.0, -0.0, torch.nan, -torch.nan, torch.inf, 3e4, -3e4, 6e-8, -100.0, 100.0]], dtype=dtype)
    tile, grad = tile_of(pre, activation), torch.ones_like(pre)
    for found, plain in zip(evaluated(tile, grad)[:2], evaluated(tile, grad, plain=True)[:2], strict=True):
        finite = plain.isfinite()
        assert torch.equal(found.isnan()[:, 2:4], plain.isnan()[:, 2:4])
        assert_near(found[finite], plain[finite], dtype)


@needs_compiler
def test_no_gradient_passes_where_relu_is_flat():
    """Also an infinite one, as in plain PyTorch: 0 times it would be NaN."""
    pre, grad = torch.tensor([[-1.0, 0.0, 1.0]]), torch.full((1, 3), torch.inf)
    assert evaluated(tile_of(pre, "relu"), grad)[1].tolist() == [[0.0, 0.0, torch.inf]]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_may_lie_in_memory_as_it_likes(dtype):
    pre, weight = random(21, 70, dtype=dtype), random(21, 70, dtype=dtype, seed=1)
    tile = tile_of(pre[4:13], "tanh", rows=slice(4, 13), all_rows=21)
    *_, expected = evaluated(tile, folding=Folding(weight, 0.3, torch.empty_like(weight)))
    wide = torch.full((21, 200), torch.nan, dtype=dtype)
    wide[:, 50:120] = weight
    for laid in (weight.t().contiguous().t(), wide[:, 50:120], wide.repeat(1, 2)[:, 50:450:2][:, :70].copy_(weight)):
        *_, folded = evaluated(tile, folding=Folding(laid, 0.3, torch.empty_like(weight)))
        assert torch.equal(folded[4:13], expected[4:13])


def test_rows_start_with_a_block():
    with pytest.raises(ValueError, match="rows must start at a multiple of 4, got 2"):
        tile_of(torch.zeros(5, 3), "gelu", 0.4, rows=slice(2, 7), all_rows=9).evaluate_()


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_share_the_rows_without_a_seam(threads, monkeypatch):
    monkeypatch.setattr(cpu_pass, "_ELEMENTS_OF_A_THREAD", 1)
    for rows in (1, 4, 13, 40):
        pre, grad, weight = (random(rows, 70, dtype=torch.bfloat16, seed=seed) for seed in range(3))
        call = tile_of(pre, "gelu", 0.3), grad, True, Folding(weight, 0.3, torch.empty_like(weight))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        alone = evaluated(*call)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        assert all(map(torch.equal, evaluated(*call), alone))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_every_cpu_gets_the_same_masks_and_near_numbers(march, fresh, monkeypatch):
    """The versions among which a library chooses, one by one."""
    needed = {"x86-64": "", "x86-64-v3": "AVX2", "x86-64-v4": "AVX512"}[march]
    if (found := torch.backends.cpu.get_cpu_capability()) not in ("AVX512", needed) and needed:
        pytest.skip(f"this CPU has {found}")
    monkeypatch.setenv("CXX", f"c++ -march={march} -DGENFT_ONE_CPU")
    for shape in SHAPES:
        test_masks_are_those_of_plain_pytorch(*shape, torch.float32)
    for dtype, activation in itertools.product(DTYPES, ACTIVATIONS):
        test_numbers_are_those_of_plain_pytorch(activation, 0.3, dtype)


def program(path, script):
    """A shell script at `path`, to be run by its name."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def result():
    """U of a small update by whatever there is."""
    return tile_of(torch.ones(9, 5), "identity", 0.4).evaluate_(value=True)


def assert_compiled():
    expected = evaluated(tile_of(torch.ones(9, 5), "identity", 0.4), plain=True)[0]
    assert torch.equal(result(), expected) and cpu_pass.state() == "the tiled form on a CPU: compiled"


def assert_plain(reason):
    """Plain PyTorch computes the same, with one warning, in which `reason` is."""
    expected = evaluated(tile_of(torch.ones(9, 5), "identity", 0.4), plain=True)[0]
    warning = f"the tiled form takes longer, computed by plain PyTorch: .*{reason}"
    with pytest.warns(UserWarning, match=warning) as told:
        for _ in range(2):
            assert torch.equal(result(), expected)
    assert len(told) == 1
    state = cpu_pass.state()
    start = "the tiled form on a CPU: plain PyTorch: "
    assert state.startswith(start) and str(told[0].message).endswith(state[len(start) :])


@needs_compiler
@pytest.mark.parametrize("name", ["tiled-tall-bias", "dropout-tall", "column-tiled-bias"])
def test_operations_give_the_same_in_plain_pytorch(name, monkeypatch):
    case = case_of(name)
    data = make_data(case)
    compiled = run(genft_linear, data, case.config, backend="eager", training=True, seed=1)
    monkeypatch.setattr(cpu_pass, "_compiled", lambda: "no compiler")
    plain = run(genft_linear, data, case.config, backend="eager", training=True, seed=1)
    for key, expected in plain.items():
        assert relative_error(compiled[key], expected) <= 1e-12, key


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
        ("echo 'int other;' | cc -shared -o cpu_update.so -xc -", "undefined symbol: genft_update_tile"),
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


def test_other_devices_compute_by_themselves():
    pre = torch.empty(9, 5, device="meta")
    update = Update(pre.new_empty(9, 1), pre.new_empty(5, 1), "gelu", 0.4, pre.new_empty(1, dtype=torch.int64), 1)
    u = UpdateTile(update, slice(0, 9), pre).evaluate_(value=True)
    assert u.device.type == "meta" and u.shape == (9, 5)
