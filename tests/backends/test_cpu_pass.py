"""The sweep over an update on a CPU by compiled code: the numbers of plain PyTorch."""

import itertools

import pytest
import torch

from genft_kernels import philox, scratch
from genft_kernels.activations import ACTIVATIONS
from genft_kernels.backends.eager import cpu_pass, rounding
from genft_kernels.backends.eager.fold import Folding
from genft_kernels.backends.eager.rounding import round_stochastically
from genft_kernels.backends.eager.sweep import _plain, elementwise_, sweep
from genft_kernels.backends.eager.update_tile import Others, Sums, Update, Wanted
from genft_kernels.functional import genft_linear
from tests.helpers.cases import case_of, make_data, relative_error, run
from tests.helpers.cpu_library import needs_compiler

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


def update_of(pre, activation, dropout=0.0, seed=7, stream=1):
    """An update whose left right^T is `pre`."""
    return Update(pre, torch.eye(pre.shape[1], dtype=pre.dtype), activation, dropout, torch.tensor([seed]), stream)


def evaluated(update, grad=None, value=True, folding=None, plain=False, rows=None):
    """(U, the gradient of left right^T, the folded weight), of some rows, by compiled code or by plain PyTorch."""
    rows = rows or slice(0, update.left.shape[0])
    folding = folding and folding._replace(out=torch.full_like(folding.out, torch.nan))
    if plain:
        pre, grad = update.left[rows] @ update.right.t(), None if grad is None else grad.clone()
        return elementwise_(update, rows, pre, grad, folding), grad, folding and folding.out
    # Products with ones on a diagonal are the numbers themselves.
    wide = torch.promote_types(update.left.dtype, torch.float32)
    u, p = (
        torch.full((rows.stop - rows.start, update.right.shape[0]), torch.nan, dtype=wide) if wanted else None
        for wanted in (value, grad is not None)
    )
    cpu_pass.run(update, rows, Others(right=update.right), grad, Sums(p, None, u, None), folding)
    return u, p, folding and folding.out


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
        ones = update_of(
            torch.ones(1, columns, dtype=dtype).expand(all_rows, columns), "identity", dropout, seed, stream
        )
        u, p, _ = evaluated(ones, ones.left[rows].contiguous(), rows=rows)
        keep = philox.keep_mask(torch.tensor([seed]), stream, columns, all_rows, dropout, rows)
        assert torch.equal(u != 0, keep) and torch.equal(p != 0, keep)
        assert torch.equal(u, (keep.double() / (1 - dropout)).to(u.dtype)) and torch.equal(p, u)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_numbers_are_those_of_plain_pytorch(activation, dropout, dtype):
    pre, grad, weight = (random(203, 130, dtype=dtype, seed=seed) for seed in range(3))
    update, folding = update_of(pre, activation, dropout), Folding(weight, 0.3, torch.empty_like(weight))
    u, p, folded = evaluated(update, grad, folding=folding)
    for found, expected in zip((u, p, folded), evaluated(update, grad, folding=folding, plain=True), strict=True):
        assert_near(found, expected, dtype)
    if dtype.itemsize > 2 and activation in ("identity", "relu", "leaky_relu"):
        assert torch.equal(u, evaluated(update, plain=True)[0])
        assert torch.equal(p, evaluated(update, grad, plain=True)[1])


@needs_compiler
def test_what_is_not_wanted_is_not_written():
    pre, grad, weight = (random(9, 70, seed=seed) for seed in range(3))
    update, folding = update_of(pre, "gelu", 0.2), Folding(weight, 0.3, torch.empty_like(weight))
    u, p, folded = evaluated(update, grad, folding=folding)
    for wants_grad, value, folds in itertools.product((False, True), repeat=3):
        found = evaluated(update, grad if wants_grad else None, value, folding if folds else None)
        assert torch.equal(found[0], u) if value else found[0] is None
        assert torch.equal(found[1], p) if wants_grad else found[1] is None
        assert torch.equal(found[2], folded) if folds else found[2] is None


@needs_compiler
@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_is_at_most_twice_plain_pytorchs(activation, dtype, scale):
    pre, grad = random(101, 70, dtype=dtype) * scale, random(101, 70, dtype=dtype, seed=1)
    update, exact = update_of(pre, activation, 0.1), update_of(pre.double(), activation, 0.1)
    results = evaluated(update, grad), evaluated(update, grad, plain=True), evaluated(exact, grad.double(), plain=True)
    for found, plain, true in zip(*(each[:2] for each in results), strict=True):
        error, of_plain = ((each.double() - true).norm() / true.norm() for each in (found, plain))
        assert error <= 2 * of_plain + torch.finfo(dtype).eps / 32


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_read_and_written(dtype):
    """NaN, infinities and subnormal ones among them; written where the update is nothing."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    nothing = Folding(every, 0.0, torch.empty_like(every))
    u, p, _ = evaluated(update_of(every, "identity"), every)
    *_, folded = evaluated(update_of(torch.zeros_like(every), "identity"), folding=nothing)
    for found in (u, p):  # a sum, which an infinity may make NaN of
        assert torch.equal(found.isfinite(), every.isfinite())
        assert torch.equal(found[every.isfinite()], every[every.isfinite()].float())
    assert torch.equal(folded.isnan(), every.isnan())
    assert torch.equal(folded.nan_to_num(0.0), every.nan_to_num(0.0))


@needs_compiler
@pytest.mark.parametrize("seed", [0, 5, -3, 2**20 - 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_folded_rows_have_the_bits_of_stochastic_rounding(dtype, seed):
    pre, weight = random(40, 77, dtype=dtype) * 1e-3, random(40, 77, dtype=dtype, seed=1)
    for rows in (slice(0, 40), slice(8, 13)):
        folding = Folding(weight, 0.5, torch.empty_like(weight))
        update = update_of(pre, "identity", seed=seed)
        *_, folded = evaluated(update, folding=folding, rows=rows)
        expected = torch.empty_like(weight)
        round_stochastically(weight.float() + 0.5 * pre.float(), torch.tensor([seed]), expected)
        assert torch.equal(folded[rows], expected[rows]) and folded[rows.stop :].isnan().all()
        *_, plain = evaluated(update, folding=folding, plain=True, rows=rows)
        assert torch.equal(plain[rows], expected[rows])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_folded_numbers_that_are_too_large_are_infinite(dtype):
    largest, smallest = torch.finfo(dtype).max, torch.finfo(torch.float32).tiny
    weight = torch.tensor([largest, largest, -largest, largest], dtype=dtype)[:, None]
    update = torch.tensor([largest, largest / 2, -largest, smallest], dtype=dtype)[:, None]
    *_, folded = evaluated(update_of(update, "identity"), folding=Folding(weight, 1.0, torch.empty_like(weight)))
    assert folded[:, 0].tolist() == [torch.inf, torch.inf, -torch.inf, largest]


@needs_compiler
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_are_those_of_plain_pytorch(dtype, activation):
    numbers = [0.0, -0.0, torch.nan, -torch.nan, torch.inf, 3e4, -3e4, 6e-8, -100.0, 100.0]
    update, grad = update_of(torch.tensor(numbers, dtype=dtype)[:, None], activation), torch.ones(10, 1, dtype=dtype)
    for found, plain in zip(evaluated(update, grad)[:2], evaluated(update, grad, plain=True)[:2], strict=True):
        finite = plain.isfinite()
        assert torch.equal(found.isnan()[2:4], plain.isnan()[2:4])
        assert_near(found[finite], plain[finite], dtype)


@needs_compiler
def test_no_gradient_passes_where_relu_is_flat():
    """Also an infinite one, as in plain PyTorch: 0 times it would be NaN."""
    pre, grad = torch.tensor([[-1.0], [0.0], [1.0]]), torch.full((3, 1), torch.inf)
    assert evaluated(update_of(pre, "relu"), grad)[1].tolist() == [[0.0], [0.0], [torch.inf]]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_may_lie_in_memory_as_it_likes(dtype):
    pre, weight = random(21, 70, dtype=dtype), random(21, 70, dtype=dtype, seed=1)
    update, rows = update_of(pre, "tanh"), slice(4, 13)
    *_, expected = evaluated(update, rows=rows, folding=Folding(weight, 0.3, torch.empty_like(weight)))
    wide = torch.full((21, 200), torch.nan, dtype=dtype)
    wide[:, 50:120] = weight
    for laid in (weight.t().contiguous().t(), wide[:, 50:120], wide.repeat(1, 2)[:, 50:450:2][:, :70].copy_(weight)):
        *_, folded = evaluated(update, rows=rows, folding=Folding(laid, 0.3, torch.empty_like(weight)))
        assert torch.equal(folded[4:13], expected[4:13])


def test_rows_start_with_a_block():
    with pytest.raises(ValueError, match="rows must start at a multiple of 4, got 2"):
        evaluated(update_of(torch.zeros(9, 3), "gelu", 0.4), rows=slice(2, 7))


EVERYTHING = Wanted(True, True, True, True)


def swept(update, others, plain=False):
    """All that there is of a sweep."""
    folding = Folding(random(update.left.shape[0], update.right.shape[0], seed=9), 0.3, torch.empty(0))
    folding = folding._replace(weight=folding.weight.to(update.left.dtype))
    folding = folding._replace(out=torch.empty_like(folding.weight))
    found = (_plain if plain else cpu_pass.sweep)(update, others, EVERYTHING, folding)
    return [*found, folding.out]


def thin(rows, columns, k, m, dtype):
    """An update and two matrices beside it; some lie in memory transposed, or with gaps."""
    left, right = random(rows, k, dtype=dtype), random(k, columns, dtype=dtype, seed=1).t()
    others = Others(random(rows, 2 * m, dtype=dtype, seed=2)[:, ::2], random(columns, m, dtype=dtype, seed=3))
    return Update(left, right, "gelu", 0.3, torch.tensor([7]), 1), others


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1), (300, 70, 5, 2), (9, 130, 4, 8), (301, 64, 37, 100), (8, 8, 0, 3)], ids=str
)
def test_sums_are_those_of_plain_pytorch(size, dtype, monkeypatch):
    update, others = thin(*size, dtype)
    monkeypatch.setattr("genft_kernels.backends.eager.update_tile._TILE_ELEMENTS", 1)  # tiles of 64 rows
    wanted = swept(
        *(part._replace(left=part.left.double(), right=part.right.double()) for part in (update, others)), True
    )
    for found, plain, exact in zip(swept(update, others), swept(update, others, plain=True), wanted, strict=True):
        bound = 2 * (plain.double() - exact).norm() + 4 * torch.finfo(dtype).eps * exact.norm()
        assert (found.double() - exact).norm() <= bound


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_share_the_rows_without_a_seam(threads, monkeypatch):
    monkeypatch.setattr(cpu_pass, "_ELEMENTS_OF_A_THREAD", 1)
    for rows in (1, 4, 13, 129, 700):
        call = thin(rows, 70, 5, 3, torch.bfloat16)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        alone = swept(*call)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        assert all(map(torch.equal, swept(*call), alone))


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dropout-tall", "tiled-many-tokens", "outer-leaky_relu"])
@pytest.mark.parametrize("compiler", [pytest.param(True, marks=needs_compiler), False])
def test_another_default_device_changes_nothing(compiler, name, dtype, monkeypatch):
    if not compiler:
        monkeypatch.setattr(cpu_pass, "_compiled", lambda: "no compiler")
    case = case_of(name)
    data = make_data(case, dtype)
    options = dict(backend="eager", training=True, seed=1)
    expected = run(genft_linear, data, case.config, **options)
    monkeypatch.setattr(scratch, "_slots", scratch._Slots())  # memory as of a new thread
    rounding._dither_table.cache_clear()
    with torch.device("meta"):
        found = run(genft_linear, data, case.config, **options)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_other_devices_compute_by_themselves():
    left, right = torch.empty(9, 1, device="meta"), torch.empty(5, 1, device="meta")
    update = Update(left, right, "gelu", 0.4, left.new_empty(1, dtype=torch.int64), 1)
    sums = sweep(update, Others(left, right), EVERYTHING)
    assert [(part.device.type, len(part)) for part in sums] == [("meta", 9), ("meta", 5)] * 2
