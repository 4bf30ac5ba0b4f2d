"""Behaviour only a GPU can show: real sizes, graphs, no host synchronisation, more than 2**31 elements, torch.compile.

The shared cases run there too (test_backends.py, tests/ops/test_precision.py): `pytest -m gpu` takes them all, what is
marked slow last, and `-m "gpu and not slow"` a sample of each kind.
"""

import dataclasses
import functools

import pytest
import torch

from genft_kernels import GenFTConfig, GenFTLinear, reference
from genft_kernels.functional import factored_linear, genft_linear
from tests.helpers.accuracy import allowed_error, factored_gains, relative_errors
from tests.helpers.cases import Case, make_data, relative_error, run, runnable
from tests.helpers.cuda_graphs import captured

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
ON_GPU = [param for param in runnable() if param.values[0].device == CUDA]
KERNELS = [param for param in ON_GPU if param.values[0].backend != "eager"]

FAST = dict(shared_dim=24, specific_dim=4, inner_activation="tanh", weight_ratio="rms")
VTAB = dict(shared_dim=32, specific_dim=5, outer_activation="leaky_relu", dropout=0.1)
GLUE = dict(shared_dim=24, specific_dim=2, dropout=0.1, bias=True)
REAL = [
    Case("roberta-factored", 768, 768, FAST, leading=(8, 512)),
    Case("roberta-glue", 768, 768, GLUE, leading=(8, 512)),
    Case("vit-vtab", 768, 768, VTAB, leading=(16, 197)),
    Case("llama-q-factored", 4096, 4096, FAST, leading=(2048,)),
    Case("llama-q-decode", 4096, 4096, VTAB, leading=(1,)),
    Case("gqa-v-tiled", 4096, 1024, VTAB, leading=(1111,)),
    Case("mlp-factored-few", 4096, 11008, FAST, leading=(17,)),
    Case("mlp-tiled-129", 4096, 11008, VTAB, leading=(129,)),
]


@functools.cache
def without_kinks(case):
    """With gelu for leaky_relu: of millions of float32 arguments a few lie within a rounding of its kink, and each that
    changes sides changes the gradients by 1 / sqrt(in out) of their norm, hundreds of times float32's errors."""
    settings = {"outer_activation": "gelu"} if "outer_activation" in case.settings else {}
    return dataclasses.replace(case, settings={**case.settings, **settings})


@functools.lru_cache(maxsize=1)  # the last one's gigabytes go before the next one's come
def judged(case, dtype):
    """(data, float64's results, plain PyTorch's errors at `dtype`), on the GPU: one draw is millions of elements."""
    data = make_data(case).to(dtype).to(CUDA)
    exact = run(reference.genft_linear, data.to(torch.float64), case.config, training=True, seed=3)
    plain = run(reference.genft_linear, data, case.config, training=True, seed=3)
    return data, exact, relative_errors(plain, exact)


@pytest.mark.parametrize("on", ON_GPU)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_real_sizes(case, dtype, on):
    case = without_kinks(case) if dtype == torch.float32 else case
    data, exact, plain = judged(case, dtype)
    for name, actual in run(genft_linear, data, case.config, training=True, seed=3, backend=on.backend).items():
        error, allowed = relative_error(actual, exact[name]), allowed_error(plain[name], dtype, case.longest_sum)
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("on", KERNELS)
@pytest.mark.parametrize("case", REAL[:3], ids=lambda case: case.name)
def test_bits_are_the_same_in_ten_runs(case, on):
    data = make_data(case).to(torch.bfloat16).to(CUDA)
    first, *others = (
        run(genft_linear, data, case.config, training=True, seed=5, backend=on.backend) for _ in range(10)
    )
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize("case", REAL[:3], ids=lambda case: case.name)
def test_pipelines_depth_does_not_show_in_a_result(case, monkeypatch):
    """Triton's pipelines leave the order of sums alone, so cards that differ in memory give the same bits."""
    from genft_kernels.backends.triton import contract, thin

    data, results = make_data(case).to(torch.bfloat16).to(CUDA), []
    for depth in (2, 3, 4):
        for module in (contract, thin):
            monkeypatch.setattr(module, "stages", lambda *arguments, depth=depth: depth)
        results.append(run(genft_linear, data, case.config, training=True, seed=5, backend="triton"))
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


@pytest.mark.parametrize("on", ON_GPU)
@pytest.mark.parametrize("case", REAL[:3], ids=lambda case: case.name)
def test_host_never_waits_for_the_gpu(case, on):
    data = make_data(case).to(torch.bfloat16).to(CUDA)
    run(genft_linear, data, case.config, training=True, backend=on.backend)  # compiles, tunes, uploads
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        run(genft_linear, data, case.config, training=True, backend=on.backend)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("on", ON_GPU)
@pytest.mark.parametrize("case", REAL[:3], ids=lambda case: case.name)
def test_captured_graph_follows_its_inputs(case, on):
    """Forward and backward are captured once and replayed with another x and another seed."""
    data, seed = make_data(case).to(torch.bfloat16).to(CUDA), torch.tensor([1], device=CUDA)

    def step():
        return run(genft_linear, data, case.config, training=True, seed=seed, backend=on.backend)

    graph, found = captured(step)
    with torch.no_grad():
        data.x.copy_(torch.randn_like(data.x))
        seed.fill_(77)
    graph.replay()
    for name, expected in step().items():
        assert torch.equal(found[name], expected), name


@pytest.mark.filterwarnings("ignore")  # of the compiler's, such as that tf32 is off
@pytest.mark.parametrize("on", ON_GPU)
@pytest.mark.parametrize("case", [REAL[0], REAL[2]], ids=lambda case: case.name)  # compiling takes long
def test_compile_has_no_graph_break(case, on):
    data, options = make_data(case).to(torch.float32).to(CUDA), dict(training=True, backend=on.backend)
    seed = torch.tensor([9], device=CUDA)
    expected = run(genft_linear, data, case.config, seed=seed, **options)
    torch._dynamo.reset()
    compiled = run(torch.compile(genft_linear, fullgraph=True), data, case.config, seed=seed, **options)
    for name in expected:
        assert relative_error(compiled[name], expected[name]) <= 1e-5, name


@pytest.mark.parametrize("on", ON_GPU)
def test_seeds_come_from_the_gpus_generator(on):
    layer = GenFTLinear(64, 48, config=GenFTConfig(**GLUE, zero_delta=False), backend=on.backend, device=CUDA)
    x = torch.randn(9, 64, device=CUDA)
    results = []
    for seed in (4, 4, 5):
        torch.cuda.manual_seed(seed)
        results.append(layer(x))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def skip_unless_free(gib: int) -> None:
    torch.cuda.empty_cache()  # what earlier tests have freed is free
    if torch.cuda.mem_get_info()[0] < gib << 30:
        pytest.skip(f"needs {gib} GiB of GPU memory")


@pytest.mark.parametrize("on", KERNELS)
def test_elements_of_x_may_be_more_than_two_to_the_31(on):
    """The last tokens alone give the same y and dx, and gradients, if only they have one."""
    tokens, n_in, n_out, last = 2**21 + 1000, 1024, 64, slice(-300, None)
    skip_unless_free(16)  # 4 for each of x, dx and what stands between
    assert tokens * n_in > 2**31
    x = torch.randn(tokens, n_in, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(n_out, n_in, device=CUDA, dtype=torch.bfloat16) / 32
    h = torch.randn(n_in, 16, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    b = torch.randn(n_out, 16, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    dy = torch.zeros(tokens, n_out, device=CUDA, dtype=torch.bfloat16)
    dy[last] = torch.randn(300, n_out, device=CUDA)
    options = dict(activation="gelu", training=True, seed=1, backend=on.backend)

    def results(x, dy):
        y = factored_linear(x, weight, None, h, b, **options)
        return y, *torch.autograd.grad(y, [x, h, b], dy)

    y, dx, dh, db = results(x, dy)
    few = x[last].detach().requires_grad_()
    for name, actual, expected in zip(
        ("y", "dx", "dh", "db"), (y[last], dx[last], dh, db), results(few, dy[last]), strict=True
    ):
        assert relative_error(actual, expected) <= 0.02, name


@pytest.mark.parametrize("on", KERNELS)
@pytest.mark.parametrize("tokens", [3, 200])
def test_elements_of_w_may_be_more_than_two_to_the_31(tokens, on):
    """The last rows and columns of W, alone, give the same y and dx."""
    n_in, n_out, last = 32_800, 65_600, slice(-100, None)
    skip_unless_free(16)  # 4 for each of W, W + dW forward and backward
    assert n_in * n_out > 2**31
    weight = torch.randn(n_out, n_in, device=CUDA, dtype=torch.bfloat16)
    weight *= 1 / 128
    x = torch.randn(tokens, n_in, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    h = torch.randn(n_in, 8, device=CUDA, dtype=torch.bfloat16) / 16
    b = torch.randn(n_out, 8, device=CUDA, dtype=torch.bfloat16) / 16
    dy = torch.randn(tokens, n_out, device=CUDA, dtype=torch.bfloat16)
    options = dict(activation="tanh", seed=1, backend=on.backend)
    y = factored_linear(x, weight, None, h, b, **options)
    (dx,) = torch.autograd.grad(y, x, dy)
    rows = weight[last].float() + torch.tanh(b[last].float() @ h.float().T)
    assert relative_error(y[:, last], x.float() @ rows.T) <= 0.02
    columns = weight[:, last].float() + torch.tanh(b.float() @ h[last].float().T)
    assert relative_error(dx[:, last], dy.float() @ columns) <= 0.02


@pytest.mark.parametrize("on", ON_GPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [8192, 128, 16])
@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_delta_gain_at_real_sizes(activation, tokens, dtype, on):
    """A vendor's products round in another place at each size: half of a small update can get lost in silence."""
    gains = factored_gains(on.backend, CUDA, dtype, tokens, features=4096, narrow=4096, activation=activation)
    assert all(abs(each - 1) <= 0.05 for each in gains), gains
