"""The custom ops: schema, fakes, gradients, torch.compile."""

from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from genft_kernels import GenFTConfig, GenFTLinear, apply_genft, backends, ops
from genft_kernels.functional import factored_linear, genft_linear
from tests.helpers.cases import CASES, make_data, relative_error, run
from tests.helpers.tiny_models import Encoder, randomise, tokens

BY_NAME = {case.name: case for case in CASES}
DTYPES = [torch.float32, torch.bfloat16]
CPU = torch.device("cpu")


def tensors(*shapes, dtype):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def seed():
    return torch.tensor([3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_column(activation, bias, dtype):
    down, bias_vector = tensors((2, 5, 9), (5,), dtype=dtype)
    weights = [torch.randn(7, 9).to(dtype) for _ in range(2)]
    torch.library.opcheck(ops.column, (weights, down, bias_vector if bias else None, activation, "eager"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_column_of_transposed_weights_lies_in_columns(bias, dtype):
    down, bias_vector = (t.detach() for t in tensors((2, 5, 9), (5,), dtype=dtype))
    weights = [torch.randn(9, 7).to(dtype).t() for _ in range(2)]
    arguments = down, bias_vector if bias else None, "gelu", "eager"
    torch.library.opcheck(ops.column, (weights, *arguments))  # the fake knows of it
    h, _ = ops.column(weights, *arguments)
    rows, _ = ops.column([weight.contiguous() for weight in weights], *arguments)
    mixed, _ = ops.column([weights[0], weights[1].contiguous()], *arguments)
    assert h.mT.is_contiguous() and rows.is_contiguous() and mixed.is_contiguous()
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert torch.allclose(h, rows, atol=tolerance) and torch.allclose(mixed, rows, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outer, dropout", [("identity", 0.0), ("silu", 0.0), ("tanh", 0.2)])
@pytest.mark.parametrize("inner", ["identity", "tanh"])
def test_opcheck_row(inner, outer, dropout, dtype):
    left, right, down, bias = tensors((2, 7, 4), (2, 9, 4), (2, 3, 7), (3,), dtype=dtype)
    seeds = torch.tensor([3, 4])
    torch.library.opcheck(ops.row, (left, right, down, bias, seeds, outer, dropout, inner, "eager"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation, dropout", [("identity", 0.0), ("leaky_relu", 0.0), ("identity", 0.2)])
@pytest.mark.parametrize("leading", [(), (0,), (2, 3)])
def test_opcheck_linear(leading, activation, dropout, dtype):
    x, h, b, bias = tensors((*leading, 9), (9, 4), (7, 4), (7,), dtype=dtype)
    weight = torch.randn(7, 9).to(dtype)
    torch.library.opcheck(ops.linear, (x, weight, bias, h, b, seed(), 0.5, activation, dropout, 1, "eager"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_backwards(dtype):
    grad, weight, pre = (t.detach() for t in tensors((1, 7, 5), (7, 9), (1, 7, 5), dtype=dtype))
    torch.library.opcheck(ops.column_backward, (grad, [weight], pre, "gelu", [True, False], "eager"))
    grad, left, right, down = (t.detach() for t in tensors((1, 9, 3), (1, 7, 4), (1, 9, 4), (1, 3, 7), dtype=dtype))
    needs = [True, False, True, True]
    for outer, dropout in (("identity", 0.0), ("relu", 0.3)):
        arguments = (grad, left, right, down, grad.new_empty(0), seed(), outer, dropout, "identity", needs, "eager")
        torch.library.opcheck(ops.row_backward, arguments)
    grad, x, weight, h, b, xh = (
        t.detach() for t in tensors((2, 7), (2, 9), (7, 9), (9, 4), (7, 4), (2, 4), dtype=dtype)
    )
    for activation in ("identity", "gelu"):
        for needs in ([True] * 4, [True, False, False, False], [False, True, True, False]):
            arguments = (grad, x, weight, h, b, xh, seed(), 0.5, activation, 0.0, 1, needs, "eager")
            torch.library.opcheck(ops.linear_backward, arguments)


@pytest.mark.parametrize("backend", ["aot_eager"])
@pytest.mark.parametrize(
    "name", ["factored-square", "dropout-tiled-bias-out_in", "ratio-all-rms-tiled", "column-tiled-bias", "row-tiled"]
)
def test_compile_has_no_graph_break(name, backend):
    case = BY_NAME[name]
    data, options = make_data(case, torch.float32), dict(training=True, seed=seed())
    eager = run(genft_linear, data, case.config, **options)
    torch._dynamo.reset()
    compiled = run(torch.compile(genft_linear, fullgraph=True, backend=backend), data, case.config, **options)
    for key, expected in eager.items():
        assert relative_error(compiled[key], expected) <= 1e-6, key


@pytest.mark.parametrize(
    ("name", "opaque"),
    [("factored-wide-bias", set()), ("sum-factored-bias", set()), ("row-tiled", {"column", "linear"})],
)
def test_compiled_graph_holds_products_in_place_of_factored_operations(name, opaque):
    """Custom ops take the host longer than the products do. The tiled form stays what it is, and so do kernels."""
    targets, added_to, case = [], [], BY_NAME[name]

    def compiler(graph, inputs):
        called = [node for node in graph.graph.nodes if node.op == "call_function"]
        targets.extend(str(node.target) for node in called)
        added_to.extend(str(node.args[0]) for node in called if "addmm" in str(node.target))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(genft_linear, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
    run(compiled, make_data(case, torch.float32), case.config, training=True, seed=seed())
    found = {target.split(".")[1] for target in targets if target.startswith("genft.")}
    assert found == opaque | {f"{operation}_backward" for operation in opaque}
    # A compiler may take addmm apart, and 0 * what is in the memory is not always 0.
    assert not [name for name in added_to if "empty" in name]
    assert backends.by_pytorch("eager", CPU) and not backends.by_pytorch("triton", CPU)


def test_compiled_model_is_the_one_that_is_not():
    def gradients(compiled):
        torch.manual_seed(3)
        config = GenFTConfig.preset("fast-sum", target_modules=["query", "value"])
        model = randomise(apply_genft(Encoder(layers=2, dim=16), config), 0.1)
        if compiled:
            torch._dynamo.reset()
            model.compile(fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu"):
            model(tokens(6, 7)).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, compiled = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert relative_error(compiled[name], gradient) < 0.02, name  # in 16 bits, and in another order


def test_compiled_module_draws_new_masks():
    layer = GenFTLinear(16, 12, config=GenFTConfig(shared_dim=3, specific_dim=1, dropout=0.5, zero_delta=False))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 16)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    compiled(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters() if p.requires_grad)
    layer.eval()
    torch.testing.assert_close(compiled(x), layer(x))


def test_backend_runs_on_the_device_of_its_tensors(monkeypatch):
    """As the forward of a model over several GPUs asks, which never sets the current device."""
    current = [0]

    def exchange(device):
        before, current[0] = current[0], device
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    seen_on = []
    backend = SimpleNamespace(column=lambda *args: seen_on.append(current[0]))
    monkeypatch.setattr(backends, "load", lambda name: backend)
    with FakeTensorMode():
        down = torch.empty(1, 2, 3, device="cuda:1")
    ops.compute("triton", "column", [], down, None, "identity")
    assert seen_on == [1] and current == [0]


def test_compiled_layer_takes_any_number_of_tokens():
    counter = CompileCounter()
    weight, h, b = torch.randn(12, 16), torch.randn(16, 3), torch.randn(12, 3)
    compiled = torch.compile(lambda x: factored_linear(x, weight, None, h, b), backend=counter, dynamic=True)
    for length in (7, 9, 11):
        compiled(torch.randn(length, 16))
    assert counter.frame_count == 1


def test_linears_output_may_be_changed_in_place():
    x, h, b = tensors((3, 9), (9, 4), (7, 4), dtype=torch.float64)
    weight = torch.randn(7, 9, dtype=torch.float64)
    expected = torch.autograd.grad(factored_linear(x, weight, None, h, b).relu().square().sum(), [x, h, b])
    y = factored_linear(x, weight, None, h, b)
    actual = torch.autograd.grad(torch.relu_(y).square().sum(), [x, h, b])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))
