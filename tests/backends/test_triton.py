"""The Triton backend alone: the interpreter's mend, rounding bits, its ops, and machine code without a GPU.

The kernels themselves run on the shared cases in tests/backends/test_backends.py, in a process with TRITON_INTERPRET=1.
"""

import itertools
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from genft_kernels import philox
from genft_kernels.activations import ACTIVATIONS, activate, activation_backward
from genft_kernels.backends.launchers import Update
from genft_kernels.functional import genft_linear
from tests.helpers.cases import case_of, check_every_op, make_data, run

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language
from genft_kernels.backends.triton import math as triton_math  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = pathlib.Path(__file__).parents[2]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="runs in the process without TRITON_INTERPRET")

# A bfloat16 product, a cast and a sum; exits with 1 if any is off.
_PROBE = """
import sys, torch
if sys.argv[1] == "mended":
    from tests.helpers import triton_interpreter
    triton_interpreter.install()
sys.path.insert(0, sys.argv[2])
from interpreter_probe import bf16_works
sys.exit(0 if bf16_works() else 1)
"""
_KERNEL = """
import torch, triton, triton.language as tl

@triton.jit
def kernel(a, b, out):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(out + at, (tl.dot(x, y) * 1.01).to(tl.bfloat16) + x)

def bf16_works():
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = torch.empty(16, 16, dtype=torch.bfloat16)
    kernel[(1,)](a, b, out)
    return torch.equal(out, ((a.float() @ b.float()) * 1.01).bfloat16() + a)
"""


@compiled
@pytest.mark.parametrize("state, status", [("plain", 1), ("mended", 0)])
def test_interpreters_bfloat16_needs_the_mend(state, status, tmp_path):
    (tmp_path / "interpreter_probe.py").write_text(_KERNEL)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", _PROBE, state, str(tmp_path)], env=environment, capture_output=True)
    assert result.returncode == status, result.stderr.decode()[-800:]


@triton.jit
def _activations(z, values, slopes, NAME: tl.constexpr):
    at = tl.arange(0, 1024)
    tl.store(values + at, triton_math.activate(tl.load(z + at), NAME))
    tl.store(slopes + at, triton_math.activation_slope(tl.load(z + at), NAME))


@interpreted
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_bear_a_gpus_exp_and_division(name, monkeypatch):
    """A GPU's are off by up to 2 units in the last place each; where terms cancel, that is many of a small result."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def inexact(operation):
        def call(*args):
            exact = operation(*args)
            wrong = 1 + 2**-22 * torch.empty(exact.data.shape).uniform_(-1, 1).numpy()
            return TensorHandle(exact.data * wrong, exact.dtype)

        return call

    for operation in ("create_exp", "create_fdiv", "create_erf"):
        monkeypatch.setattr(InterpreterBuilder, operation, inexact(getattr(InterpreterBuilder, operation)))
    z = torch.logspace(-4, 1, 512)
    z = torch.cat([z, -z])
    values, slopes = torch.empty_like(z), torch.empty_like(z)
    _activations[(1,)](z, values, slopes, name)
    exact, exact_slopes = activate(name, z.double()), activation_backward(name, torch.ones(1024).double(), z.double())
    # In gelu's negative tail 1 + erf cancels in PyTorch too.
    size = z.abs() if name == "gelu" else exact.abs()
    assert ((values - exact).abs() <= 1e-6 * size).all()
    assert ((slopes - exact_slopes).abs() <= 1e-6 * (1 + z.abs())).all()


@interpreted
def test_float32_sums_lose_less_than_one_chain_of_additions(monkeypatch):
    """On a GPU a float32 product is such a chain in each thread, unlike the interpreter's."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from genft_kernels.backends.triton import operations as backend

    def chain(left, right, total):
        for unit in range(left.shape[1]):
            total = (left[:, unit, None].astype("f8") * right[None, unit] + total).astype("f4")
        return total

    def create_dot(self, a, b, total, *settings):
        return TensorHandle(chain(a.data, b.data, total.data), total.dtype.scalar)

    def loss(actual, exact):
        return (actual - exact).norm()

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    x, weight = torch.randn(8, 2000), torch.randn(20, 2000)
    exact = x.double() @ weight.double().T
    chained = loss(torch.from_numpy(chain(x.numpy(), weight.T.numpy(), 0.0)), exact)
    assert 2 * loss(backend.column([x], weight[None], None, "identity")[0][0], exact) < chained


@interpreted
@pytest.mark.parametrize("dtype, bits", [(torch.bfloat16, 16), (torch.float16, 13)], ids=str)
def test_fold_rounds_by_the_words_of_stream_2(dtype, bits):
    from genft_kernels.backends.triton.operations import kernels

    n_out, n_in, k, seed = 70, 37, 5, torch.tensor([2**40 + 3])
    weight = torch.randn(n_out, n_in).to(dtype)
    h, b = torch.randn(n_in, k).to(dtype), torch.randn(n_out, k).to(dtype)
    folded = kernels.fold(weight, Update(b, h, "identity", 0.0, seed, philox.ROW_STREAM), 0.01)
    exact = weight.float() + 0.01 * (b.float() @ h.float().T)
    counters = torch.arange(n_in)[:, None] * -(-n_out // 4) + torch.arange(n_out) // 4  # [in, out]
    words = philox.words(counters.reshape(-1), seed, philox.ROUNDING_STREAM).view(n_in, n_out, 4)
    words = words.gather(2, (torch.arange(n_out) % 4).expand(n_in, -1)[..., None]).squeeze(2).T  # [out, in]
    integers = exact.view(torch.int32) + (words >> (32 - bits)).to(torch.int32)
    expected = (integers & -(1 << bits)).view(torch.float32).to(dtype)
    # Where a sum in another order moves the last bit of float32, one rounding in 2**13 may differ.
    assert (folded != expected).double().mean() < 0.01
    assert (folded.float() - exact).abs().max() <= exact.abs().max() * 2 ** (bits - 23)


@interpreted
@pytest.mark.parametrize("name", ["factored-square", "dropout-tiled-bias-out_in", "tiled-many-tokens"])
def test_ops_pass_opcheck(name):
    check_every_op(case_of(name), "triton")


@interpreted
def test_contraction_of_many_tokens_is_split():
    from genft_kernels.backends.eager import operations as eager
    from genft_kernels.backends.triton import operations as backend

    x, dy, weight, h, b = (torch.randn(*shape) for shape in ((1100, 20), (1100, 12), (12, 20), (20, 3), (12, 3)))
    settings = None, torch.tensor([5]), 0.5, "gelu", 0.3, philox.ROW_STREAM, [False, False, True, True]
    expected = eager.linear_backward(dy, x, weight, h, b, *settings)
    for actual, true in zip(backend.linear_backward(dy, x, weight, h, b, *settings)[2:], expected[2:], strict=True):
        torch.testing.assert_close(actual, true, rtol=1e-4, atol=1e-4)


@interpreted
def test_long_sums_over_weights_are_split():
    from genft_kernels.backends.eager import operations as eager
    from genft_kernels.backends.triton import operations as backend

    weights = [torch.randn(12, 3000), torch.randn(12, 3000)]  # ten parts
    down, bias = torch.randn(2, 5, 3000), torch.randn(5)
    for call, arguments in (
        ("column", (weights, down, bias, "gelu")),
        ("column_backward", (torch.randn(2, 3000, 5), [w.t() for w in weights], None, "identity", [True, False])),
    ):
        for actual, true in zip(*(getattr(module, call)(*arguments) for module in (backend, eager)), strict=True):
            assert actual is true is None or torch.allclose(actual, true, rtol=1e-4, atol=1e-4)


@interpreted
def test_strides_of_every_operand_are_respected():
    case = case_of("tiled-square")
    data = make_data(case, torch.float32)
    wide = torch.randn(63, 2 * 63)
    for x in (torch.randn(63, 9).t(), torch.randn(9, 126)[:, ::2], torch.randn(63).expand(9, 63)):
        for weight in (wide[:, ::2], torch.randn(63, 63).t()):
            results = []
            for backend in ("triton", "reference"):
                leaf = x.detach().requires_grad_()
                y = genft_linear(leaf, weight, None, data.params, case.config, backend=backend)
                results.append((y, *torch.autograd.grad(y.sum(), [leaf, data.params.row_up])))
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("tokens", [5, 140])
def test_addresses_beyond_two_to_the_31(tokens, tmp_path):
    """Rows of x, dy and W lie 2**31 / 3 elements apart, in a file of which only what is touched exists."""
    from genft_kernels.backends.triton import operations as triton

    apart = 2**31 // 3
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=5 * apart, dtype=torch.float32)
    close = [torch.randn(shape) for shape in ((tokens, 24), (5, 24), (tokens, 5))]  # x, W, dy
    x, weight, dy = close
    # Many tokens would need too large a file: the columns then lie apart.
    far_dy = file.as_strided((tokens, 5), (1, apart)).copy_(dy)
    far_weight = file[1000:].as_strided((5, 24), (apart, 1)).copy_(weight)
    h, b, settings = torch.randn(24, 3), torch.randn(5, 3), (torch.tensor([3]), 0.5, "gelu", 0.0, 1)
    expected, xh = triton.linear(x, weight, None, h, b, *settings)
    actual, _ = triton.linear(x, far_weight, None, h, b, *settings)
    torch.testing.assert_close(actual, expected)
    needs = [True, False, True, True]
    expected = triton.linear_backward(dy, x, weight, h, b, xh, *settings, needs)
    actual = triton.linear_backward(far_dy, x, far_weight, h, b, xh, *settings, needs)
    for one, other in zip(actual, expected, strict=True):
        assert one is other is None or torch.allclose(one, other, atol=1e-5)


@interpreted
@pytest.mark.parametrize("name", ["factored-square", "dropout-tiled-bias-out_in"])
def test_compile_has_no_graph_break(name):
    case = case_of(name)
    data, options = make_data(case, torch.float32), dict(training=True, seed=torch.tensor([3]), backend="triton")
    expected = run(genft_linear, data, case.config, **options)
    compiled = run(torch.compile(genft_linear, fullgraph=True, backend="aot_eager"), data, case.config, **options)
    for key in expected:
        torch.testing.assert_close(compiled[key], expected[key])


@compiled
def test_pipeline_is_as_deep_as_the_cards_memory_allows(monkeypatch):
    from genft_kernels.backends.triton import launch

    half, single = torch.empty(1, dtype=torch.bfloat16), torch.empty(1)
    for bytes_of_card, depth in ((227 << 10, 4), (99 << 10, 3), (64 << 10, 2), (16 << 10, 2)):
        monkeypatch.setattr(launch, "shared_memory", lambda device, found=bytes_of_card: found)
        assert launch.stages(half, 4, 256 * 64) == depth and launch.stages(single, 4, 256 * 64) == 2


@compiled
def test_shipped_kernels_fit_a_card():
    """A sample of the test below: every kernel once."""
    from benchmarks.compiled.triton_report import faults, rows_of

    rows = list(rows_of(torch.bfloat16, 32, ["sm_90"], once=True))
    assert len(rows) == 8 and not [fault for row in rows for fault in faults(row)]


@compiled
@pytest.mark.slow
def test_shipped_kernels_fit_the_cards():
    """Nothing that `faults` names is in any of them for sm_80, sm_89 and sm_90; sm_100 and gfx942 compile."""
    from benchmarks.compiled.triton_report import faults, rows_of

    seen, cards = set(), ["sm_80", "sm_89", "sm_90"]
    large = rows_of(torch.bfloat16, 48, cards, once=True, features=(4096, 4096))
    for row in itertools.chain(rows_of(torch.bfloat16, 32, cards), large):
        assert not list(faults(row)), row
        seen.add(row["kernel"])
    assert len(seen) == 8
    others = list(rows_of(torch.bfloat16, 48, ["sm_100", "gfx942"], once=True))
    assert len(others) == 2 * len(seen)
    assert {row["kernel"] for row in others if not row["matrix"].get("mfma", 1)} == {"sum_parts"}  # it only adds


@compiled
def test_kernels_compile_for_ones():
    """Triton makes a constant of an argument that is 1, and a constant has none of a tensor's methods."""
    from benchmarks.compiled.triton_compile import recording
    from genft_kernels.backends.triton import operations as backend

    one, seed, settings = torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), (0.5, "gelu", 1.5 * 2**-32, 1)
    with recording() as launches:  # a threshold of 1, and every length
        backend.linear(one, one, None, one, one, seed, *settings)
        backend.linear_backward(one, one, one, one, one, None, seed, *settings, [True, False, True, True])
        backend.row(one[None], one[None], one[None], one[0], seed, *settings[1:3], "tanh")
        backend.row_backward(*[one[None]] * 5, seed, *settings[1:3], "tanh", [True] * 4)
    kernels = ["contract", "fold", "row_backward_in", "row_backward_out", "row_forward", "sum_parts"]
    assert sorted(launch.name for launch in launches) == kernels
    for launch in launches:
        assert dict(launch.constants).get("threshold", 1) == 1
        launch.compile("sm_90")


@compiled
def test_experts_seeds_need_one_kernel():
    """An expert's seed is a view, of which every other one lies at a multiple of 16 bytes."""
    from benchmarks.compiled.triton_compile import recording
    from genft_kernels.backends.triton import operations as backend

    x, thin, seeds = torch.empty(48, 64), torch.empty(64, 16), torch.zeros(4, dtype=torch.int64)
    with recording() as launches:
        for expert in range(4):
            settings = seeds[expert : expert + 1], 0.5, "gelu", 0.1, 1
            backend.linear(x, torch.empty(64, 64), None, thin, thin, *settings)
            backend.linear_backward(x, x, torch.empty(64, 64), thin, thin, None, *settings, [True, False, True, True])
    assert sorted(launch.name for launch in launches) == ["contract", "fold", "sum_parts"]


@compiled
@pytest.mark.parametrize("dtype, edges", [(torch.bfloat16, {256: 64, 257: 32, 1024: 16}), (torch.float32, {512: 16})])
def test_tiles_of_the_row_stage_leave_room_for_all_units(dtype, edges):
    """At k 512 and edges of 64 `row_forward` took 147,456 bytes of shared memory, where an sm_89 has 101,376."""
    from benchmarks.compiled.triton_compile import recording
    from genft_kernels.backends.triton import operations as backend

    for k, edge in edges.items():
        thin, down = torch.empty(1, 16, k, dtype=dtype), torch.empty(1, k, 16, dtype=dtype)
        with recording() as launches:
            backend.row(thin, thin, down, None, None, "gelu", 0.0, "identity")
            backend.row_backward(thin, thin, thin, down, None, None, "gelu", 0.0, "identity", [True] * 3 + [False])
        forward, to_left = (
            dict(next(launch for launch in launches if launch.name == name).constants)
            for name in ("row_forward", "row_backward_out")
        )
        assert (forward["BLOCK_OUT"], forward["BLOCK_IN"], to_left["BLOCK_OUT"]) == (edge, edge, edge)


@compiled
def test_backend_without_a_gpu_says_so_by_name_only():
    case = case_of("tiled-square")
    data = make_data(case, torch.float32)
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is at hand")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run on cpu: it needs a CUDA device"):
        genft_linear(data.x, data.weight, data.bias, data.params, case.config, backend="triton")
    genft_linear(data.x, data.weight, data.bias, data.params, case.config)
