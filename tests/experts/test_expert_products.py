"""`expert_linear`: every expert's product in both forms, what is kept, and what an expert without rows costs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from genft_kernels import apply_genft, flops, ops, reference
from genft_kernels.backends.eager import operations as eager
from genft_kernels.experts import products
from genft_kernels.experts.products import expert_linear_node
from genft_kernels.philox import ROW_STREAM
from tests.helpers.accuracy import gain
from tests.helpers.cases import relative_error
from tests.helpers.expert_models import experts_of, mixtral, routed, settings

COUNTS = (5, 0, 7, 1, 0)  # the tokens of each expert
IN, OUT, K = 20, 14, 3
FORMS = {"factored": ("identity", 0.0), "tiled": ("gelu", 0.0), "dropout": ("leaky_relu", 0.3)}


def offsets_of(counts=COUNTS):
    return torch.tensor([0, *counts]).cumsum(0)


def data(dtype=torch.float64, counts=COUNTS, beyond: int = 2):
    """x, W, bias, h, b and seeds; `beyond` rows belong to no expert."""
    generator = torch.Generator().manual_seed(0)
    rows, experts = sum(counts) + beyond, len(counts)
    shapes = (rows, IN), (experts, OUT, IN), (experts, OUT), (experts, IN, K), (experts, OUT, K)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return *tensors, torch.arange(7, 7 + experts)


def called(x, weight, bias, h, b, seed, activation="identity", dropout=0.0, scale=0.7, backend="eager"):
    return expert_linear_node(
        x, offsets_of(), weight, bias, h, b, seed, scale, activation, dropout, ROW_STREAM, backend
    )


def by_reference(x, weight, bias, h, b, seed, activation, dropout):
    """Each expert alone, by the specification."""
    outputs = []
    for expert, rows in enumerate(x.split([*COUNTS, x.shape[0] - sum(COUNTS)])[: len(COUNTS)]):
        own = weight[expert], bias[expert], h[expert], b[expert]
        options = dict(scale=0.7, activation=activation, dropout=dropout, training=True, seed=seed[expert : expert + 1])
        outputs.append(reference.factored_linear(rows, *own, **options))
    return torch.cat([*outputs, x.new_zeros(x.shape[0] - sum(COUNTS), OUT)])


@pytest.mark.parametrize("stored", ["as it is", "transposed"])
@pytest.mark.parametrize(("activation", "dropout"), FORMS.values(), ids=FORMS)
def test_every_expert_is_a_layer_of_its_own(activation, dropout, stored):
    x, weight, bias, h, b, seed = data()
    if stored == "transposed":
        weight = weight.mT.contiguous().mT
    leaves = [tensor.requires_grad_() for tensor in (x, h, b)]
    y = called(x, weight, bias, h, b, seed, activation, dropout)
    wanted = by_reference(x, weight, bias, h, b, seed, activation, dropout)
    slope = torch.randn(y.shape, dtype=y.dtype)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    grads, others = (torch.autograd.grad((out * slope).sum(), leaves) for out in (y, wanted))
    for found, other in zip(grads, others, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-12, atol=1e-12)


def test_weights_without_an_update():
    x, weight, bias, *_ = data()
    x.requires_grad_()
    y = called(x, weight, bias, None, None, None)
    wanted = torch.cat([p @ w.T + c for p, w, c in zip(x.split([*COUNTS, 2]), weight, bias, strict=False)])
    torch.testing.assert_close(y[:-2], wanted)
    assert not y[-2:].any()
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(wanted.sum(), x)[0])


@pytest.mark.parametrize(("activation", "dropout"), FORMS.values(), ids=FORMS)
def test_operation_passes_opcheck(activation, dropout):
    x, weight, bias, h, b, seed = data()
    for tensor in (x, h, b):
        tensor.requires_grad_()
    arguments = x, offsets_of(), weight, bias, h, b, seed, 0.7, activation, dropout, ROW_STREAM, "eager"
    torch.library.opcheck(products.expert_linear, arguments)


def test_operation_without_an_update_passes_opcheck():
    x, weight, bias, *_ = data()
    arguments = x.requires_grad_(), offsets_of(), weight, bias, None, None, None, 1.0, "identity", 0.0, 0, "eager"
    torch.library.opcheck(products.expert_linear, arguments)


@pytest.mark.parametrize(("activation", "dropout"), FORMS.values(), ids=FORMS)
def test_expert_without_rows_costs_nothing(activation, dropout, monkeypatch):
    calls = []

    def counting(backend, operation, first, *args):
        calls.append((operation, first.shape[0]))
        return ops.compute(backend, operation, first, *args)

    monkeypatch.setattr(products, "compute", counting)
    x, weight, bias, h, b, seed = data()
    for tensor in (x, h, b):
        tensor.requires_grad_()
    called(x, weight, bias, h, b, seed, activation, dropout).sum().backward()
    rows = [count for count in COUNTS if count]
    assert calls == [("linear", n) for n in rows] + [("linear_backward", n) for n in rows]


@pytest.mark.parametrize(("activation", "dropout"), FORMS.values(), ids=FORMS)
def test_nothing_of_the_stacks_size_is_kept_beside_it(activation, dropout):
    x, weight, bias, h, b, seed = data()
    for tensor in (x, h, b):
        tensor.requires_grad_()
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        called(x, weight, bias, h, b, seed, activation, dropout).sum()
    assert weight.data_ptr() in kept  # W itself, no copy
    beside = sum(t.numel() for address, t in kept.items() if address not in (weight.data_ptr(), x.data_ptr()))
    assert beside <= h.numel() + b.numel() + x.shape[0] * K + len(COUNTS) + seed.numel() + 1


def test_tiled_form_folds_one_expert_at_a_time(monkeypatch):
    """No tensor of two experts' size is made, forward or backward."""
    sizes = []
    original = eager.linear

    def watched(x, weight, *args):
        sizes.append(weight.numel())
        return original(x, weight, *args)

    monkeypatch.setattr(eager, "linear", watched)
    x, weight, bias, h, b, seed = data()
    called(x, weight, bias, h, b, seed, "gelu")
    assert sizes == [IN * OUT] * sum(count > 0 for count in COUNTS)


@pytest.mark.parametrize("form", [{}, dict(outer_activation="leaky_relu"), dict(transform="column")], ids=str)
def test_delta_gain_at_a_thousandth_of_experts_in_bfloat16(form):
    """Of the projection to gate and up, whose halves have an update each."""
    gains = []
    for seed in range(4):
        model = mixtral(hidden=96, inner=80)
        apply_genft(model, settings(**form))
        update = experts_of(model).updates["gate_up_proj"]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            scale = 1e-3 * (update.weight.norm() / update.delta_weight().norm()).item()
        model = mixtral(hidden=96, inner=80)
        apply_genft(model, settings(**form, scaling=scale))
        model.to(torch.bfloat16)
        update = experts_of(model.train()).updates["gate_up_proj"]
        counts = torch.tensor([40, 0, 90, 60, 0, 50])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        x = torch.randn(240, 96, generator=generator).to(torch.bfloat16).requires_grad_()
        y = update(x, offsets, None)
        slope = torch.randn(y.shape, generator=generator).to(torch.bfloat16)
        (dx,) = torch.autograd.grad(y, x, slope)
        delta = update.delta_weight().detach().double()
        frozen, exact, slope = update.stored_weight.double(), x.detach().double(), slope.double()
        parts = list(zip(exact.split(counts.tolist()), slope.split(counts.tolist()), frozen, delta, strict=True))
        y0, of_update = (torch.cat([p @ m[i].T for p, _, *m in parts]) for i in (0, 1))
        dx0, dx_of_update = (torch.cat([s @ m[i] for _, s, *m in parts]) for i in (0, 1))
        gains.append([gain(y, y0, of_update), gain(dx, dx0, dx_of_update)])
    mean = torch.tensor(gains).mean(0)
    assert ((mean >= 0.95) & (mean <= 1.05)).all(), mean


def test_dropout_draws_a_mask_for_every_expert_and_each_forward():
    model = apply_genft(mixtral(), settings(dropout=0.4, transform="column")).train()
    experts, inputs = experts_of(model), routed()
    torch.manual_seed(5)
    first = experts(*inputs)
    torch.manual_seed(5)
    assert torch.equal(experts(*inputs), first)
    assert not torch.equal(experts(*inputs), first)
    model.eval()
    assert torch.equal(experts(*inputs), experts(*inputs))
    x = torch.randn(12, 24, dtype=torch.float64)
    update = experts.updates["down_proj"].train()
    frozen, rows = update.stored_weight, torch.arange(0, 14, 2)
    with torch.no_grad():
        own = update.specific_parameters()
        for name in own:
            own[name][1] = own[name][0]
        update.weight[1] = update.weight[0]
        y = update(x[:2].repeat(6, 1), rows, None)
    assert frozen is update.stored_weight
    assert relative_error(y[:2], y[2:4]) > 1e-3  # equal experts with equal tokens, but for their masks


@pytest.mark.parametrize("form", FORMS)
def test_flops_are_those_of_one_layer_for_every_expert(form):
    """Of equal experts, all with rows: as many as a layer's for each."""
    assert flops  # a counter knows what is registered when it is made
    activation, dropout = FORMS[form]
    counts = (4, 4, 4)
    x, weight, bias, h, b, seed = data(counts=counts, beyond=0)

    def counted(call):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, h, b)]
        with FlopCounterMode(display=False) as counter:
            call(*leaves).sum().backward()
        return counter.get_total_flops()

    settings = 1.0, activation, dropout, ROW_STREAM, "eager"

    def alone(x, h, b):
        each = zip(x.split(4), weight, bias, h, b, seed.split(1), strict=True)
        return torch.cat([ops.linear_node(*part, *settings) for part in each])

    def together(x, h, b):
        return expert_linear_node(x, offsets_of(counts), weight, bias, h, b, seed, *settings)

    assert counted(together) == counted(alone) > 0
