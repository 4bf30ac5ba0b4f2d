"""The PEFT tuner: what this package's own layers answer, for any number of adapters, and clear errors for the rest."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from genft_kernels import accumulate, explain, trainable_summary
from tests.helpers.tiny_models import Encoder, FusedEncoder, GroupedQueryBlock, TiedModel, tokens

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from genft_kernels.integrations.peft.layer import GenFTLayer  # noqa: E402
from tests.helpers.peft_models import (  # noqa: E402
    TransposedEncoder,
    base,
    folded,
    group_of,
    layers_of,
    own_model,
    own_names,
    peft_config,
    peft_model,
    with_second_adapter,
)

MODELS = {
    "square": (Encoder, {}),
    "tiled": (Encoder, dict(outer_activation="silu", scaling=0.5)),
    "biases-out_in": (Encoder, dict(bias=True, delta_layout="out_in", weight_ratio="rms")),
    "several-shapes": (GroupedQueryBlock, dict(target_modules=r".*_proj", exclude_modules=["k_proj"])),
    "fused": (FusedEncoder, dict(target_modules=["qkv", "proj"], fused_blocks={"qkv": (3, (0, 2))})),
    "conv1d": (TransposedEncoder, dict(target_modules=["c_attn", "c_proj"], transform="column")),
    "shared-only": (Encoder, dict(specific_dim=0)),
    "modules_to_save": (Encoder, dict(modules_to_save=["classifier"])),
}


@pytest.mark.parametrize("make, settings", MODELS.values(), ids=MODELS)
def test_tuner_answers_and_learns_as_apply_genft(make, settings):
    model = peft_model(make, **settings)
    own = own_model(model, make, **settings)
    answers = [each(tokens()) for each in (model, own)]
    assert torch.allclose(*answers, rtol=1e-12, atol=1e-12)
    for answer in answers:
        answer.square().sum().backward()
    gradients = own_names({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected = {name: p.grad for name, p in own.named_parameters() if p.requires_grad}
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-9, atol=1e-12), name


def test_layers_of_a_shape_are_generated_together_once_a_step():
    model = peft_model().train()
    group = group_of(model)
    for step in range(3):
        model(tokens()).sum().backward()
        assert group.generations == step + 1 and len(group.layers) == 4
    with accumulate(model):
        for _ in range(3):
            model(tokens()).sum().backward()
    assert group.generations == 4


def kept_bytes(model) -> int:
    """What a forward keeps for the backward, each memory once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens()).sum()
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("settings", [{}, dict(outer_activation="silu")], ids=["factored", "tiled"])
def test_tuner_keeps_no_more_for_the_backward_than_apply_genft(settings):
    model = peft_model(**settings)
    assert kept_bytes(model) <= 1.03 * kept_bytes(own_model(model, **settings))


def test_accumulate_gives_the_gradients_of_the_same_passes():
    model = peft_model()
    for _ in range(2):
        model(tokens()).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with accumulate(model):
        for _ in range(2):
            model(tokens()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in expected)
        assert parameter.grad is None or torch.allclose(parameter.grad, expected[name], rtol=1e-9, atol=1e-12), name


def test_explain_and_summary_know_the_adapters_of_a_peft_model():
    model = peft_model(modules_to_save=["classifier"])
    assert "8x8: 4 layers on cpu in one generation" in explain(model)
    summary, own = trainable_summary(model), trainable_summary(own_model(model, modules_to_save=["classifier"]))
    assert (summary["generators"], summary["specific"]) == (own["generators"], own["specific"])
    assert summary["trainable"] == own["trainable"] and summary["other"] == own["modules_to_save"]
    with pytest.raises(RuntimeError, match="no GenFT adapter"):
        explain(base())


def test_a_new_adapter_changes_nothing_but_without_init_weights():
    expected = base()(tokens())
    assert torch.equal(peft.get_peft_model(base(), peft_config()).eval()(tokens()), expected)
    assert not torch.equal(peft.get_peft_model(base(), peft_config(init_weights=False)).eval()(tokens()), expected)


# --- several adapters -----------------------------------------------------------------------------------------------

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


# --- merging --------------------------------------------------------------------------------------------------------


def test_merge_is_of_the_frozen_weight_in_any_order_and_undone_bit_for_bit():
    model = with_second_adapter(peft_model(dtype=torch.float32))
    weights = {name: layer.base_layer.weight for name, layer in model.named_modules() if isinstance(layer, GenFTLayer)}
    at_once = folded(model, "default", "other")
    model.merge_adapter(["other"])
    with pytest.warns(UserWarning, match="additionally merging default"):
        model.merge_adapter(["default"])
    for name, weight in weights.items():
        merged = model.get_submodule(name).base_layer.weight
        assert torch.allclose(merged, at_once.get_submodule(name).base_layer.weight, rtol=1e-6, atol=1e-7)
        assert not torch.equal(merged, weight)
    model.unmerge_adapter()
    assert all(model.get_submodule(name).base_layer.weight is weight for name, weight in weights.items())


def test_merge_leaves_a_tied_weight_alone():
    model = peft.get_peft_model(base(TiedModel), peft_config(target_modules=["head"], init_weights=False))
    before = model.base_model.model.embedding.weight.clone()
    model.merge_adapter()
    assert torch.equal(model.base_model.model.embedding.weight, before)
    assert not torch.equal(model.base_model.model.head.base_layer.weight, before)


def test_safe_merge_refuses_what_is_not_finite():
    model = peft_model()
    before = [layer.weight for layer in model.modules() if isinstance(layer, GenFTLayer)]
    model.base_model.genft_shared["default"]["8x8_row_up"].data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert all(layer.weight is w for layer, w in zip(layers_of(model), before, strict=True))


def test_merge_and_unload_leaves_a_plain_model_that_answers_alike():
    model = peft_model()
    answer = model(tokens())
    plain = model.merge_and_unload()
    assert torch.allclose(plain(tokens()), answer, rtol=1e-10, atol=1e-12)
    assert list(plain.state_dict()) == list(base().state_dict())


def test_unload_gives_the_frozen_model_back():
    model = peft_model()
    assert torch.equal(model.unload()(tokens()), base()(tokens()))


def test_lora_conversion_of_full_rank_is_exact():
    model = peft_model()
    answer = model(tokens())
    config, state = peft.convert_to_lora(model, rank=3)
    lora = peft.get_peft_model(base(), config).eval()
    peft.set_peft_model_state_dict(lora, state)
    assert torch.allclose(lora(tokens()), answer, rtol=1e-4, atol=1e-5)  # PEFT computes it in float32


# --- hooks, copies --------------------------------------------------------------------------------------------------


def test_hooks_of_the_base_layer_see_each_answer_once():
    frozen, seen = base(), []
    frozen.layers[0].attention.query.register_forward_hook(lambda module, args, output: seen.append(output))
    model = with_second_adapter(peft.get_peft_model(frozen, peft_config(init_weights=False)).eval())
    layer = model.base_model.model.layers[0].attention.query
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    answers = [layer(x)]
    model.merge_adapter()
    answers.append(layer(x))
    model.unmerge_adapter()
    with model.disable_adapter():
        answers.append(layer(x))
    model.unload()(tokens())
    assert len(seen) == 4 and all(a is b for a, b in zip(answers, seen, strict=False))


def test_a_copy_is_independent():
    model = peft_model()
    twin = copy.deepcopy(model)
    answer = twin(tokens())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert torch.equal(twin(tokens()), answer)
    assert group_of(twin) is not group_of(model) and set(group_of(twin).layers).isdisjoint(group_of(model).layers)


@pytest.mark.parametrize("second", [{}, dict(outer_activation="silu")], ids=["factored", "tiled"])
def test_compiled_graphs_answer_alike(second):
    model = with_second_adapter(peft_model(), **second)
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.layers[0].attention.query
    x = torch.randn(4, 8, dtype=torch.float64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), layer(x), rtol=1e-10, atol=1e-12)


def test_a_new_layer_is_in_the_mode_of_the_one_it_replaces():
    model = peft.get_peft_model(base().eval(), peft_config(dropout=0.5, init_weights=False))
    assert not any(module.training for layer in layers_of(model) for module in layer.modules())
    assert torch.equal(model(tokens()), model(tokens()))
