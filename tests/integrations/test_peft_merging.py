"""Adapters that leave the PEFT tuner: merged, unloaded, and converted to LoRA."""

import pytest
import torch

from tests.helpers.tiny_models import Encoder, FusedEncoder, GroupedQueryBlock, TiedModel, tokens

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from genft_kernels.integrations.peft.layer import GenFTLayer  # noqa: E402
from tests.helpers.peft_models import (  # noqa: E402
    TransposedEncoder,
    base,
    folded,
    layers_of,
    peft_config,
    peft_model,
    updates,
    with_second_adapter,
)


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


@pytest.mark.parametrize("settings", [{}, dict(modules_to_save=["classifier"])], ids=["", "container-trained"])
def test_merge_and_unload_leaves_a_plain_model_that_answers_alike(settings):
    model = peft_model(**settings)
    answer = model(tokens())
    plain = model.merge_and_unload()
    assert torch.allclose(plain(tokens()), answer, rtol=1e-10, atol=1e-12)
    assert list(plain.state_dict()) == list(base().state_dict())


def test_unload_gives_the_frozen_model_back():
    model = peft_model()
    assert torch.equal(model.unload()(tokens()), base()(tokens()))


def test_unload_leaves_a_trained_container_as_peft_does():
    model = peft_model(modules_to_save=["classifier"])
    trained = model.base_model.model.classifier.modules_to_save["default"]
    plain = model.unload()
    assert plain.classifier is trained and list(plain.state_dict()) == list(base().state_dict())


# --- converted to LoRA ----------------------------------------------------------------------------------------------

# (model, settings, rank)
CONVERSIONS = {
    "square": (Encoder, {}, 3),
    "biases-out_in": (Encoder, dict(bias=True, delta_layout="out_in", scaling=0.05), 4),
    "several-shapes": (GroupedQueryBlock, dict(target_modules=["q_proj", "v_proj"], transform="column"), 3),
    "fused": (FusedEncoder, dict(target_modules=["qkv"], fused_blocks={"qkv": (3, (0, 2))}), 6),
    "conv1d": (TransposedEncoder, dict(target_modules=["c_attn", "c_proj"], bias=True), 4),
}


@pytest.fixture
def no_svd(monkeypatch):
    """LoRA by the factors themselves."""

    def refuse(*args, **kwargs):
        raise AssertionError("an SVD")

    monkeypatch.setattr(torch.linalg, "svd", refuse)


def as_lora(make, folder):
    return peft.PeftModel.from_pretrained(base(make), folder).eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("more", [0, 2])
@pytest.mark.parametrize("make, settings, rank", CONVERSIONS.values(), ids=CONVERSIONS)
def test_save_as_lora_writes_the_factors(make, settings, rank, more, no_svd, tmp_path):
    model = peft_model(make, **settings)
    answer = model(tokens())
    peft.save_as_lora(tmp_path, model, rank=rank + more)
    loaded = as_lora(make, tmp_path)
    assert loaded.peft_config["default"].r == rank + more
    assert torch.allclose(loaded(tokens()), answer, rtol=1e-11, atol=1e-12)


def test_a_whole_share_of_the_energy_takes_the_factors_as_they_are(no_svd):
    config, state = peft.convert_to_lora(peft_model(), rank=1.0)
    assert set(config.rank_pattern.values()) == {3} and {tensor.dtype for tensor in state.values()} == {torch.float64}


@pytest.mark.parametrize("settings", [{}, dict(outer_activation="silu")], ids=["factored", "tiled"])
def test_a_smaller_rank_keeps_the_largest_singular_values(settings, tmp_path):
    model = peft_model(**settings)
    deltas = updates(model)
    peft.save_as_lora(tmp_path, model, rank=2)
    loaded = as_lora(Encoder, tmp_path)
    for path, delta in deltas.items():
        rest = delta - loaded.get_submodule(path).get_delta_weight("default")
        values = torch.linalg.svdvals(delta).square()
        assert rest.square().sum().item() == pytest.approx(values[2:].sum().item(), rel=1e-4)  # PEFT's is in float32


def test_a_share_of_the_energy_chooses_each_layers_rank():
    model = peft_model(shared_dim=4)
    config, state = peft.convert_to_lora(model, rank=0.9)
    for path, delta in updates(model).items():
        kept = torch.linalg.svdvals(delta).square().cumsum(0) / delta.square().sum()
        assert len(state[f"{path}.lora_A.weight"]) == int((kept < 0.9).sum()) + 1 < 5


def test_layers_of_other_adapters_are_no_part_of_a_conversion():
    model = with_second_adapter(peft_model(), target_modules=["dense"])
    _, state = peft.convert_to_lora(model, rank=3, adapter_name="other")
    assert state and all(".dense." in name for name in state)
