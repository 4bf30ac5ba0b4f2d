"""Whole models on a GPU give the gradients that they give in float64 on a CPU; on a CPU so, too.

Of quantised bases each layer gives what it gives over its dense weight.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

from genft_kernels import GenFTConfig, accumulate, apply_genft, backends, load_adapter, merge, save_adapter, tune
from genft_kernels.backends import choices
from tests.helpers.cuda_graphs import captured
from tests.helpers.tiny_models import Encoder, randomise, tokens

DEVICES = [
    pytest.param(torch.device("cpu"), id="cpu"),
    pytest.param(torch.device("cuda"), id="cuda", marks=pytest.mark.gpu),
]
FORMS = {
    "fast": dict(weight_ratio="rms", transform="column", scaling=0.5),
    "sum": dict(transform="sum", scaling=0.5, bias=True),
    "both": dict(inner_activation="tanh"),
    "row": dict(transform="row", inner_activation="gelu"),
    "tiled": dict(outer_activation="tanh", inner_activation="tanh"),
}
on_devices = pytest.mark.parametrize("device", DEVICES)


def config(**more):
    return GenFTConfig(
        shared_dim=6, specific_dim=2, zero_delta=False, target_modules=["query", "value"],
        modules_to_save=["classifier"], **more,
    )  # fmt: skip


def adapted(form: str, backend: str = "auto") -> nn.Module:
    """One of float64 with random units, always the same."""
    torch.manual_seed(3)
    model = Encoder(layers=3, dim=64).double()
    return randomise(apply_genft(model, config(**FORMS[form]), backend=backend), 0.1).train()


def gradients(model: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """In float64 on the CPU; of two batches of tokens."""
    model.zero_grad()
    for batch in tokens(6, 7).to(device).split(3):
        model(batch).square().mean().backward()
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.requires_grad}


def assert_near(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


@on_devices
@pytest.mark.parametrize("together", [False, True], ids=["", "accumulate"])
@pytest.mark.parametrize("backend", ["auto", "eager", "triton", "cuda"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_float64(form, backend, together, device):
    if device.type == "cpu" and backend in backends.KERNEL_BACKENDS:
        pytest.skip("kernels need a CUDA device")
    wanted = gradients(adapted(form), torch.device("cpu"))
    model = adapted(form, backend).float().to(device)
    if together:
        with accumulate(model):
            gradients(model, device)
        found = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.requires_grad}
        heads = {name for name in wanted if "classifier" in name}
        found, wanted = ({n: g for n, g in each.items() if n not in heads} for each in (found, wanted))
    else:
        found = gradients(model, device)
    assert_near(found, wanted, 1e-4)


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_under_autocast_are_near(form, dtype, device):
    wanted = gradients(adapted(form), torch.device("cpu"))
    model = adapted(form).float().to(device)
    with torch.autocast(device.type, dtype):
        found = gradients(model, device)
    assert_near(found, wanted, 0.1 if dtype == torch.bfloat16 else 0.02)


@on_devices
def test_adapter_travels_between_devices(device, tmp_path):
    model = adapted("fast").float().to(device).eval()
    save_adapter(model, tmp_path)
    torch.manual_seed(3)
    other = load_adapter(Encoder(layers=3, dim=64).double().float(), tmp_path).eval()
    batch = tokens(6, 7)
    expected = model(batch.to(device)).cpu()
    torch.testing.assert_close(other(batch), expected, rtol=1e-4, atol=1e-5)
    back = copy.deepcopy(other).to(device)
    torch.testing.assert_close(back(batch.to(device)).cpu(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merge(back)(batch.to(device)).cpu(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.gpu
def test_what_is_tuned_is_taken_and_right(tmp_path, monkeypatch):
    monkeypatch.setenv("GENFT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(choices, "_tables", {})
    device = torch.device("cuda")
    model = adapted("tiled").float().to(device)
    measured = tune(model, tokens=[32], seconds=120)  # the gate's compilations are part of it
    assert measured and all(len(each.milliseconds) >= 2 for each in measured)
    choices._tables.clear()  # another process
    assert choices.table(torch.device("cuda", 0)).keys() == {each.shape for each in measured}
    assert_near(gradients(model, device), gradients(adapted("tiled"), torch.device("cpu")), 1e-4)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of the compiler's, such as that tf32 is off
@pytest.mark.parametrize("form", ["fast", "sum", "tiled"])
def test_compiled_model_has_the_gradients_of_float64(form):
    torch._dynamo.reset()
    device = torch.device("cuda")
    model = adapted(form).float().to(device)
    model.compile(fullgraph=True)
    assert_near(gradients(model, device), gradients(adapted(form), torch.device("cpu")), 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["fast", "sum", "both"])
def test_step_is_captured_in_a_graph_and_follows_its_parameters(form):
    """Generation, forward and backward: what a replay computes is of what the parameters are by then."""
    device = torch.device("cuda")
    model, batch = adapted(form).float().to(device), tokens(6, 7).to(device)

    def step():
        model.zero_grad(set_to_none=False)
        model(batch).square().mean().backward()

    graph, _ = captured(step)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p.mul_(1.5)
    graph.replay()
    replayed = {name: p.grad.clone() for name, p in trained.items()}
    step()
    assert_near({name: p.grad for name, p in trained.items()}, replayed, 1e-5)


@on_devices
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("form", ["fast", "tiled"])
def test_experts_have_the_gradients_of_float64(form, name, device):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of whatever transformers imports, if that is there
        experts = pytest.importorskip("tests.helpers.expert_models")

    def found(dtype, device):
        torch.manual_seed(0)
        model = experts.MODELS[name]().to(torch.float64)
        settings = dict(shared_dim=4, specific_dim=2, zero_delta=False, target_parameters=experts.TARGETS)
        randomise(apply_genft(model, GenFTConfig(**settings, **FORMS[form])), 0.1)
        model.to(dtype).to(device)
        model(torch.arange(1, 25, device=device).reshape(3, 8)).logits.square().mean().backward()
        return {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.requires_grad}

    assert_near(found(torch.float32, device), found(torch.float64, torch.device("cpu")), 1e-3)


@on_devices
@pytest.mark.parametrize("form", ["fast", "tiled"])
def test_pefts_tuner_has_the_gradients_of_float64(form, device):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        helpers = pytest.importorskip("tests.helpers.peft_models")

    def found(dtype, device):
        settings = dict(shared_dim=4, specific_dim=2, zero_delta=False, inner_activation="identity")
        model = helpers.peft_model(**{**settings, **FORMS[form]}).to(dtype).to(device).train()
        model(tokens(6, 7).to(device)).square().mean().backward()
        return {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.requires_grad}

    assert_near(found(torch.float32, device), found(torch.float64, torch.device("cpu")), 1e-3)


KINDS = (
    "bitsandbytes-4bit", "bitsandbytes-4bit-plain-scales", "bitsandbytes-8bit", "torchao-int8", "torchao-float8",
    "torchao-nf4", "hqq",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the libraries' own
@on_devices
@pytest.mark.parametrize("form", ["fast", "tiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_base_is_the_one_over_its_dense_weights(kind, form, device):
    for library in ("bitsandbytes", "torchao", "hqq", "transformers"):
        pytest.importorskip(library, exc_type=ImportError)
    from tests.helpers.quantised_layers import share_units
    from tests.helpers.quantised_models import KINDS, TARGETS, with_dense_targets

    dtype, ids = torch.bfloat16, torch.arange(18, device=device).reshape(2, 9)
    with torch.device(device):
        model, twin = KINDS[kind](dtype), with_dense_targets(KINDS[kind](dtype), dtype)
    model.to(device), twin.to(device)
    given = dict(shared_dim=4, specific_dim=2, zero_delta=False, target_modules=list(TARGETS), **FORMS[form])
    for each in (model, twin):
        apply_genft(each, GenFTConfig(**given))
    share_units(model, twin)
    for each in (model, twin):
        torch.manual_seed(1)  # W + dW rounds by chance
        each(ids, labels=ids).loss.backward()
    of_model, of_twin = ({n: p.grad for n, p in each.named_parameters() if p.requires_grad} for each in (model, twin))
    assert all(gradient.any() for gradient in of_model.values())
    # In 8 bits activations are rounded, too: a rounding more moves one by a step.
    assert_near(of_model, of_twin, 0.05 if kind == "bitsandbytes-8bit" else 0.02)
