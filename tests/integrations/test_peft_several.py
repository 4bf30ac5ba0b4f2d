"""Several adapters in one PEFT model: their updates add up, and each has its own switches."""

import dataclasses

import pytest
import torch
from torch import nn

from genft_kernels import set_backend
from tests.helpers.tiny_models import Encoder, FusedEncoder, tokens

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from accelerate import cpu_offload  # noqa: E402  # PEFT needs it

from tests.helpers.peft_models import (  # noqa: E402
    base,
    folded,
    peft_config,
    peft_model,
    randomised,
    with_second_adapter,
)
from tests.helpers.quantised_layers import quantised, registered  # noqa: E402

PAIRS = {
    "factored": ({}, {}),
    "factored-scales": (dict(scaling=0.5), dict(scaling=2.0)),
    "factored-biases": (dict(bias=True), dict(transform="column")),
    "tiled-and-factored": (dict(outer_activation="silu"), {}),
    "tiled": (dict(outer_activation="silu"), dict(outer_activation="gelu", scaling=0.5)),
}


@pytest.mark.parametrize("first, second", PAIRS.values(), ids=PAIRS)
def test_active_adapters_add_their_updates(first, second):
    model = with_second_adapter(peft_model(**first), **second)
    model.base_model.set_adapter(["default", "other"])
    answer = model(tokens())
    assert torch.allclose(answer, folded(model, "default", "other")(tokens()), rtol=1e-10, atol=1e-12)
    for adapter in ("default", "other"):  # each has its part in it
        assert (answer - folded(model, adapter)(tokens())).abs().max() > 1e-3
    assert torch.allclose(set_backend(model, "reference")(tokens()), answer, rtol=1e-10, atol=1e-12)


def test_reference_refuses_different_blocks_as_the_others_do():
    fused = dict(target_modules=["qkv"])
    model = peft_model(FusedEncoder, fused_blocks={"qkv": (3, (0, 2))}, **fused)
    set_backend(with_second_adapter(model, **fused), "reference").base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="different blocks of one weight cannot act together"):
        model(tokens())


def test_an_adapter_may_be_called_as_targets_are(tmp_path):
    model = peft.get_peft_model(base(), peft_config(), "query", autocast_adapter_dtype=False)
    expected = randomised(model).eval()(tokens())
    assert torch.allclose(expected, folded(model, "query")(tokens()), rtol=1e-10, atol=1e-12)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "query", "value", autocast_adapter_dtype=False)
    assert torch.equal(again.eval()(tokens()), expected)
    model.add_adapter("value", peft_config(), autocast_adapter_dtype=False)
    model.delete_adapter("value")
    assert torch.equal(model(tokens()), expected)


@pytest.mark.parametrize("active", [["default"], ["default", "other"]])
def test_offloaded_tensors_come_back_for_a_forward(active):
    """accelerate brings them where modules are called, and the tuner reads what its modules hold."""
    model = with_second_adapter(peft_model())
    model.base_model.set_adapter(active)
    expected = model(tokens())
    cpu_offload(model, execution_device="cpu")
    layer = model.base_model.model.layers[0].attention.query
    for _ in range(2):
        assert torch.allclose(model(tokens()), expected, rtol=1e-12)
        held = [layer.base_layer.weight, *layer.genft_own["default"].parameters(), *model.genft_shared.parameters()]
        assert all(tensor.device.type == "meta" for tensor in held)


def test_offloaded_codes_come_back_for_a_forward():
    registered()
    model = randomised(peft.get_peft_model(quantised(base()), peft_config()).eval())
    expected = model(tokens())
    cpu_offload(model, execution_device="cpu", offload_buffers=True)
    for _ in range(2):
        assert torch.allclose(model(tokens()), expected, rtol=1e-12)
        assert model.base_model.model.layers[0].attention.query.base_layer.codes.is_meta


@pytest.mark.filterwarnings("ignore:scaling=0")
def test_active_adapters_that_are_scaled_to_nothing_answer_as_the_frozen_model():
    model = with_second_adapter(peft_model(scaling=0.0), scaling=0.0)
    model.base_model.set_adapter(["default", "other"])
    assert torch.allclose(model(tokens()), base()(tokens()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first, second", PAIRS.values(), ids=PAIRS)
def test_active_adapters_learn_together(first, second):
    model = with_second_adapter(peft_model(**first), **second)
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.layers[0].attention.query
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    parameters = [p for name in ("default", "other") for p in layer.genft_own[name].parameters()]
    actual = torch.autograd.grad(layer(x).square().sum(), [x, *parameters])
    delta = sum(layer.genft_own[name].delta_weight() for name in ("default", "other"))
    y = nn.functional.linear(x, layer.base_layer.weight + delta, layer.base_layer.bias)
    for mine, theirs in zip(actual, torch.autograd.grad(y.square().sum(), [x, *parameters]), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("second", [{}, dict(outer_activation="silu")], ids=["factored", "tiled"])
def test_active_adapters_lose_nothing_to_rounding(second):
    torch.manual_seed(0)
    model = with_second_adapter(peft_model(lambda: Encoder(1, 64), torch.bfloat16), **second)
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.layers[0].attention.query
    with torch.no_grad():
        for update in layer.genft_own.values():  # so small that a rounded output would swallow half of it
            size = update.delta_weight().norm() / layer.weight.norm()
            update.generator.__dict__["config"] = dataclasses.replace(update.config, scaling=2e-3 / size.item())
        x = torch.randn(4096, 64, dtype=torch.bfloat16)
        delta = sum(update.delta_weight() for update in layer.genft_own.values()).double()
        effect = x.double() @ delta.T
        frozen = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        gain = ((layer(x).double() - frozen) * effect).sum() / effect.square().sum()
    assert gain == pytest.approx(1, abs=0.05)


def test_active_adapters_keep_no_matrix_of_a_weights_size():
    model = with_second_adapter(peft_model(lambda: Encoder(1, 64), outer_activation="silu"))
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.layers[0].attention.query
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    layer(x)  # generates
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    sizes.pop(layer.weight.untyped_storage().data_ptr(), None)
    assert sizes and max(sizes.values()) < layer.weight.nbytes / 4


def test_an_adapter_is_deleted_whole():
    model = with_second_adapter(peft_model(), target_modules=["dense"])
    answer = model(tokens())
    model.delete_adapter("other")
    assert not any(".other" in name for name in model.state_dict())
    assert torch.equal(model(tokens()), answer)
    model.delete_adapter("default")
    assert not any("genft_own" in name or "genft_shared" in name for name in model.state_dict())


def test_switching_trains_one_adapters_shared_tensors_only():
    model = with_second_adapter(peft_model())

    def training():
        return {name for name, p in model.named_parameters() if p.requires_grad}

    assert training() and all(".default" in name for name in training())
    model.set_adapter("other")
    assert any("genft_shared.other" in name for name in training()) and all(".other" in name for name in training())
    with model.disable_adapter():
        assert torch.equal(model(tokens()), base()(tokens()))
    assert training() and all(".other" in name for name in training())


def test_a_frozen_adapter_stays_frozen_as_another_is_added(tmp_path):
    peft_model().save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(base(), tmp_path)  # for inference
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.add_adapter("other", peft_config())
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".default" in name)


def test_the_state_of_the_base_model_has_nothing_of_an_adapter():
    model = with_second_adapter(peft_model(modules_to_save=["classifier"]))
    state = peft.get_base_model_state_dict(model)
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in base().state_dict().items()
    }
    before = dict(model.state_dict())
    peft.set_base_model_state_dict(model, base().state_dict())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
