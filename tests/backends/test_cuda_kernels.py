"""The CUDA kernels one by one: every layout of W, many hidden units, masks and rounding bit for bit, special values.

On the CPU they run under tests/cuda_host; the operations as wholes are in tests/backends/test_backends.py.
"""

import dataclasses

import pytest
import torch

from genft_kernels import philox
from genft_kernels.activations import activate
from genft_kernels.backends import KERNEL_DTYPES
from genft_kernels.backends.cuda import operations as cuda
from genft_kernels.backends.cuda.operations import kernels as cuda_kernels
from genft_kernels.backends.eager import operations as eager
from genft_kernels.backends.launchers import Update
from genft_kernels.functional import genft_linear
from tests import cuda_host
from tests.helpers.accuracy import allowed_error
from tests.helpers.cases import CPU, case_of, make_data, relative_error, run

DEVICES = [
    pytest.param(
        CPU, id="cpu", marks=pytest.mark.skipif(cuda_host.unavailable_reason() is not None, reason="no g++ or headers")
    ),
    pytest.param(torch.device("cuda"), id="cuda", marks=pytest.mark.gpu),
]
DTYPES = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
UNITS = pytest.mark.parametrize("k", [1, 16, 37, 64, 200])
LAYOUTS_AND_UNITS = pytest.mark.parametrize(
    "layout, k",
    [
        ("rows", 1),
        ("rows", 16),
        ("rows", 64),
        ("rows", 200),
        ("columns", 37),
        ("unaligned", 37),
        ("every other", 37),
        ("padded", 37),
    ],
)
N_OUT, N_IN = 270, 150  # several tiles, with edges


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def random(dtype, device, *shape):
    return torch.randn(shape, dtype=torch.float64).div(shape[-1] ** 0.5).to(device, dtype)


def laid_out(matrix, layout):
    """The same matrix with other strides, or an address that is no multiple of 16."""
    rows, columns = matrix.shape
    match layout:
        case "rows":
            return matrix
        case "columns":
            return matrix.t().contiguous().t()
        case "unaligned":
            return matrix.new_empty(rows * columns + 1)[1:].view(rows, columns).copy_(matrix)
        case "padded":  # rows at multiples of 16 bytes, NaN between them
            return matrix.new_full((rows, columns // 8 * 8 + 16), torch.nan)[:, :columns].copy_(matrix)
        case "every other":
            return matrix.new_empty(rows, 2 * columns)[:, ::2].copy_(matrix)


def judge(operation, *arguments):
    """Each result of an operation has an error that plain PyTorch's allows; for smooth activations."""
    exact = getattr(eager, operation)(*(_cast(argument, torch.float64) for argument in arguments))
    plain = getattr(eager, operation)(*arguments)
    found = getattr(cuda, operation)(*arguments)
    longest_sum = max(size for tensor in _tensors(arguments) for size in tensor.shape)
    for index, (ours, pytorchs, true) in enumerate(zip(found, plain, exact, strict=True)):
        if true is not None:
            assert ours.shape == true.shape and ours.dtype == pytorchs.dtype
            allowed = allowed_error(relative_error(pytorchs, true), ours.dtype, longest_sum)
            assert relative_error(ours, true) <= allowed, index


def _tensors(arguments):
    for argument in arguments:
        if isinstance(argument, list):
            yield from _tensors(argument)
        elif isinstance(argument, torch.Tensor):
            yield argument


def _cast(argument, dtype):
    if isinstance(argument, list):
        return [_cast(item, dtype) for item in argument]
    return argument.to(dtype) if isinstance(argument, torch.Tensor) and argument.is_floating_point() else argument


@DTYPES
@LAYOUTS_AND_UNITS
def test_column_of_three_layers(layout, k, dtype, device):
    weights = [laid_out(random(dtype, device, N_OUT, N_IN), layout) for _ in range(3)]
    down, bias, grad = random(dtype, device, 3, k, N_IN), random(dtype, device, k), random(dtype, device, 3, N_OUT, k)
    judge("column", weights, down, bias, "gelu")
    pre = random(dtype, device, 3, N_OUT, k)
    judge("column_backward", grad, weights, pre, "silu", [True, True])


@DTYPES
def test_long_sums_are_split(dtype, device):
    small, tokens = random(dtype, device, 1, 1500, 5), random(dtype, device, 1500, 70)
    judge("column_backward", small, [tokens], None, "identity", [True, False])
    weights = [random(dtype, device, 70, 1500) for _ in range(2)]
    judge("column", weights, random(dtype, device, 2, 5, 1500), random(dtype, device, 5), "gelu")


def test_column_of_more_layers_than_travel_with_a_launch(device):
    weights = list(random(torch.float32, device, 260, 5, 6))
    down, grad = random(torch.float32, device, 260, 3, 6), random(torch.float32, device, 260, 5, 3)
    judge("column", weights, down, None, "tanh")
    judge("column_backward", grad, weights, grad, "tanh", [True, False])


@DTYPES
@UNITS
@pytest.mark.parametrize("outer, dropout, ones", [("silu", 0.0, 0), ("tanh", 0.3, 1)])
def test_row_of_three_layers(outer, dropout, ones, k, dtype, device):
    n_out, n_in, k1 = 140, 75, k + ones  # one more unit where there is a bias
    left, right = random(dtype, device, 3, n_out, k1), random(dtype, device, 3, n_in, k1)
    down, bias, seed = random(dtype, device, 3, k, n_out), random(dtype, device, k), torch.tensor([3, -4, 2**40])
    pre, grad, seed = random(dtype, device, 3, n_in, k), random(dtype, device, 3, n_in, k), seed.to(device)
    settings = seed, outer, dropout, "gelu"
    judge("row", left, right, down, bias, *settings)
    judge("row_backward", grad, left, right, down, pre, *settings, [True] * 4)


@DTYPES
@LAYOUTS_AND_UNITS
@pytest.mark.parametrize("tokens", [9, 140])
@pytest.mark.parametrize("activation, dropout", [("identity", 0.0), ("gelu", 0.3)], ids=["factored", "tiled"])
def test_linear(activation, dropout, tokens, layout, k, dtype, device):
    x, grad = random(dtype, device, tokens, N_IN) * 10, random(dtype, device, tokens, N_OUT)
    weight, bias = laid_out(random(dtype, device, N_OUT, N_IN), layout), random(dtype, device, N_OUT)
    h, b, xh = (random(dtype, device, rows, k) * k**0.5 for rows in (N_IN, N_OUT, tokens))
    settings = torch.tensor([5], device=device), 0.5, activation, dropout, philox.ROW_STREAM
    judge("linear", x, weight, bias, h, b, *settings)
    judge("linear_backward", grad, x, weight, h, b, xh, *settings, [True] * 4)


def test_contraction_in_larger_blocks(device):
    """Enough tiles for blocks of two by two; the last ones have an edge, or lie outside."""
    n_out, n_in, k, dtype = 1500, 1420, 70, torch.bfloat16
    grad, x = random(dtype, device, 70, n_out), random(dtype, device, 70, n_in)
    h, b, weight = random(dtype, device, n_in, k), random(dtype, device, n_out, k), torch.empty(0)
    settings = torch.tensor([5], device=device), 0.5, "silu", 0.2, philox.ROW_STREAM, [False, False, True, True]
    judge("linear_backward", grad, x, weight, h, b, None, *settings)


@DTYPES
def test_contraction_of_many_tokens_is_split(dtype, device):
    grad, x = random(dtype, device, 1630, 70), random(dtype, device, 1630, 75)
    h, b, weight = random(dtype, device, 75, 5), random(dtype, device, 70, 5), torch.empty(0)
    settings = torch.tensor([5], device=device), 0.5, "silu", 0.2, philox.ROW_STREAM
    for needs in ([False, False, True, True], [False, False, False, True]):
        judge("linear_backward", grad, x, weight, h, b, None, *settings, needs)


@pytest.mark.parametrize("layout", ["columns", "unaligned", "every other", "padded"])
def test_tokens_of_any_strides(layout, device):
    x, grad = (laid_out(random(torch.bfloat16, device, 70, n), layout) for n in (N_IN, N_OUT))
    weight, h, b = (random(torch.bfloat16, device, *shape) for shape in ((N_OUT, N_IN), (N_IN, 7), (N_OUT, 7)))
    settings = torch.tensor([5], device=device), 0.5, "tanh", 0.0, philox.ROW_STREAM
    judge("linear", x, weight, None, h, b, *settings)
    judge("linear_backward", grad, x, weight, h, b, None, *settings, [True] * 4)


def test_expanded_and_overlapping_tokens(device):
    weight, h, b = (random(torch.float32, device, *shape) for shape in ((33, 40), (40, 7), (33, 7)))
    line = random(torch.float32, device, 60)
    settings = None, 0.5, "identity", 0.0, philox.ROW_STREAM
    for x in (line[:40].expand(20, 40), line.unfold(0, 40, 1)):
        judge("linear", x, weight, None, h, b, *settings)


@pytest.mark.parametrize("activation", ["identity", "gelu"])
@pytest.mark.skipif(cuda_host.unavailable_reason() is not None, reason="no g++ or headers")
def test_addresses_beyond_two_to_the_31(activation, tmp_path):
    """Rows of x, dy and W lie 2**31 / 3 elements apart, in a file of which only what is touched exists."""
    apart = 2**31 // 3
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=5 * apart, dtype=torch.bfloat16)
    close = [torch.randn(5, n).bfloat16() for n in (24, 24, 5)]  # x, W, dy
    far = [file[100 * i :].as_strided(m.shape, (apart, 1)).copy_(m) for i, m in enumerate(close)]
    h, b, settings = (
        torch.randn(24, 3).bfloat16(),
        torch.randn(5, 3).bfloat16(),
        (torch.tensor([3]), 0.5, activation, 0.0, 1),
    )
    update, results = Update(b, h, activation, 0.0, settings[0], 1), []
    for x, weight, dy in (close, far):
        y, xh = cuda.linear(x, weight, None, h, b, *settings)
        grads = cuda.linear_backward(dy, x, weight, h, b, xh, *settings, [True, False, True, True])
        column = cuda.column([weight], torch.ones(1, 2, 24).bfloat16(), None, "identity")[0]
        results.append((y, column, cuda_kernels.fold(weight, update, 0.5), *grads))
    for one, other in zip(*results, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["identity", "gelu"])
@pytest.mark.parametrize("tokens", [9, 140])
def test_float32_weight_is_one_of_the_compute_dtype(tokens, activation, dtype, device):
    x, h, b = (random(dtype, device, *shape) for shape in ((tokens, N_IN), (N_IN, 7), (N_OUT, 7)))
    weight = random(torch.float32, device, N_OUT, N_IN)
    settings = h, b, torch.tensor([1], device=device), 0.1, activation, 0.0, philox.ROW_STREAM
    wide, narrow = (cuda.linear(x, w, None, *settings) for w in (weight, weight.to(dtype)))
    assert wide[0].dtype == dtype and torch.equal(wide[0], narrow[0])


# --- random numbers -------------------------------------------------------------------------------------------------


def keep_masks(seeds, stream, n_in, n_out, dropout):
    return torch.stack([philox.keep_mask(seed[None], stream, n_in, n_out, dropout) for seed in seeds.cpu()])


@DTYPES
def test_masks_of_the_row_stage_are_the_specifications(dtype, device):
    n_out, n_in, dropout = 130, 71, 0.4
    seeds = torch.tensor([7, -(2**62), 2**33 + 1], device=device)
    expected = keep_masks(seeds, philox.COLUMN_STREAM, n_in, n_out, dropout)  # [L, out, in]
    settings = seeds, "identity", dropout, "identity"

    def ones(*shape):
        return torch.ones(shape, device=device, dtype=dtype)

    def eye(n):
        return torch.eye(n, device=device, dtype=dtype).expand(3, n, n)

    h, _ = cuda.row(ones(3, n_out, 1), ones(3, n_in, 1), eye(n_out), None, *settings)  # Y^T, Y the mask
    assert torch.equal(h.cpu() != 0, expected.mT)
    _, _, ddown, _ = cuda.row_backward(
        eye(n_in),
        ones(3, n_out, 1),
        ones(3, n_in, 1),
        ones(3, n_in, n_out),
        None,
        *settings,
        [False, False, True, False],
    )  # (Y dZ)^T
    assert torch.equal(ddown.cpu() != 0, expected.mT)
    thin = ones(3, 1, n_out), None, *settings  # dY = 1, so that Q is the mask, too
    dz = ones(3, n_in, 1)
    dleft, *_ = cuda.row_backward(dz, ones(3, n_out, n_in), eye(n_in), *thin, [True, False, False, False])  # Q right
    assert torch.equal(dleft.cpu() != 0, expected)
    _, dright, *_ = cuda.row_backward(
        dz, eye(n_out), ones(3, n_in, n_out), *thin, [False, True, False, False]
    )  # Q^T left
    assert torch.equal(dright.cpu() != 0, expected.mT)


@DTYPES
@pytest.mark.parametrize("stream", [philox.COLUMN_STREAM, philox.ROW_STREAM])
@pytest.mark.parametrize("seed", [0, 2**63 - 1, -5])
def test_masks_of_the_token_side_are_the_specifications(seed, stream, dtype, device):
    n_out, n_in, dropout = 71, 130, 0.25
    seed = torch.tensor([seed], device=device)
    expected = keep_masks(seed, stream, n_in, n_out, dropout)[0]  # [out, in]
    ones = {rows: torch.ones(rows, 1, device=device, dtype=dtype) for rows in (n_in, n_out)}
    weight = torch.zeros(n_out, n_in, device=device, dtype=dtype)
    update = Update(ones[n_out], ones[n_in], "identity", dropout, seed, stream)
    assert torch.equal(cuda_kernels.fold(weight, update, 1.0).cpu() != 0, expected)
    transposed = weight.t().contiguous().t()
    assert torch.equal(cuda_kernels.fold(transposed, update, 1.0).cpu() != 0, expected)
    # P is the mask where dy^T x is 1 and the slope is; its product with the identity is P itself.
    dy, x = (torch.ones(1, n, device=device, dtype=dtype) for n in (n_out, n_in))
    h, b = torch.zeros(n_in, n_out, device=device, dtype=dtype), torch.eye(n_out, device=device, dtype=dtype)
    dh, _ = cuda_kernels.contract(dy, x, update._replace(left=b, right=h), 1.0, [True, False])
    assert torch.equal(dh.cpu() != 0, expected.t())


@pytest.mark.parametrize("dtype, bits", [(torch.bfloat16, 16), (torch.float16, 13)], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_fold_rounds_by_the_words_of_stream_2(layout, dtype, bits, device):
    n_out, n_in, seed = 70, 37, torch.tensor([2**40 + 3])
    weight = laid_out(random(dtype, device, n_out, n_in), layout)
    h, b = random(dtype, device, n_in, 1), random(dtype, device, n_out, 1)
    folded = cuda_kernels.fold(weight, Update(b, h, "identity", 0.0, seed.to(device), philox.ROW_STREAM), 0.125)
    exact = (weight.float() + 0.125 * (b.float() @ h.float().T)).cpu()
    counters = torch.arange(n_in)[:, None] * -(-n_out // 4) + torch.arange(n_out) // 4  # [in, out]
    words = philox.words(counters.reshape(-1), seed, philox.ROUNDING_STREAM).view(n_in, n_out, 4)
    words = words.gather(2, (torch.arange(n_out) % 4).expand(n_in, -1)[..., None])[..., 0].t()  # [out, in]
    rounded = (exact.view(torch.int32) + (words >> (32 - bits))) & -(1 << bits)
    assert torch.equal(folded.cpu(), rounded.to(torch.int32).contiguous().view(torch.float32).to(dtype))
    assert folded.stride() == (weight.stride() if layout == "columns" else (n_in, 1))


@pytest.mark.parametrize("columns", [True, False], ids=["of one column", "of one row"])
def test_fold_of_an_expanded_weight(columns, device):
    """Cast to the factors' dtype it lies otherwise than before."""
    line = random(torch.float32, device, N_OUT if columns else N_IN)
    weight = line[:, None].expand(N_OUT, N_IN) if columns else line.expand(N_OUT, N_IN)
    for dtype in (torch.float32, torch.bfloat16):
        h, b = random(dtype, device, N_IN, 7), random(dtype, device, N_OUT, 7)
        update = Update(b, h, "tanh", 0.0, None, philox.ROW_STREAM)
        exact = weight.to(dtype).double() + 0.5 * torch.tanh(b.double() @ h.double().t())
        error = (cuda_kernels.fold(weight, update, 0.5).double() - exact).norm() / exact.norm()
        assert error < 2 * torch.finfo(dtype).eps


# --- special values -------------------------------------------------------------------------------------------------


@DTYPES
def test_nan_and_infinities_stay(dtype, device):
    weight = random(dtype, device, 70, 80)
    weight[3, 5], weight[66, 70], weight[1, 1] = float("nan"), float("inf"), -float("inf")
    h, b = random(dtype, device, 80, 3), random(dtype, device, 70, 3)
    folded = cuda_kernels.fold(weight, Update(b, h, "tanh", 0.0, None, philox.ROW_STREAM), 0.5)
    special = ~weight.isfinite()
    assert torch.equal(folded[special].isnan(), weight[special].isnan()) and folded[66, 70] > 0 > folded[1, 1]
    assert folded[~special].isfinite().all()
    for activation in ("relu", "leaky_relu", "gelu", "silu", "tanh"):
        h1, pre = cuda.column([weight], random(dtype, device, 1, 3, 80), None, activation)
        assert h1[0, 3].isnan().all() and pre[0, [1, 66]].isinf().all()
        rows = torch.ones(70, dtype=torch.bool)
        rows[[1, 3, 66]] = False
        assert h1[0, rows].isfinite().all()


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "gelu", "silu", "tanh"])
def test_values_and_slopes_of_every_activation(activation, device):
    z = torch.linspace(-9, 9, 256, device=device).view(-1, 1)  # b h^T with h = 1
    one, dy, x = (torch.ones(shape, device=device) for shape in ((1, 1), (1, 256), (1, 1)))
    update = Update(z, one, activation, 0.0, None, philox.ROW_STREAM)
    folded = cuda_kernels.fold(torch.zeros(256, 1, device=device), update, 1.0)
    leaf = z.double().requires_grad_()
    value = activate(activation, leaf)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(folded.double(), value.detach(), rtol=1e-6, atol=1e-6)
    _, db = cuda_kernels.contract(dy, x, update, 1.0, [False, True])
    torch.testing.assert_close(db.double(), slope, rtol=1e-6, atol=1e-6)


def test_hidden_units_may_be_any_number(device):
    case = dataclasses.replace(
        case_of("tiled-square"), settings={**case_of("tiled-square").settings, "shared_dim": 300}
    )
    data = make_data(case, torch.float32)
    found = run(genft_linear, data.to(device), case.config, backend="cuda")
    for name, expected in run(genft_linear, data, case.config, backend="eager").items():
        assert relative_error(found[name].cpu(), expected) <= 1e-5, name


def test_same_inputs_give_the_same_bits(device):
    case = dataclasses.replace(case_of("tiled-many-tokens"), in_features=270)
    data = make_data(case, torch.bfloat16)
    first, second = (
        run(genft_linear, data.to(device), case.config, backend="cuda", training=True, seed=7) for _ in range(2)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
