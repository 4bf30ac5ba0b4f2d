"""Leaving a plain fine-tuned model behind: `remove_genft(model, keep_update=True)`."""

import pytest
import torch

from genft_kernels import GenFTConfig, GenFTLinear, apply_genft, disabled, merge, remove_genft
from tests.helpers.tiny_models import Encoder, FusedEncoder, GroupedQueryBlock, TiedModel, randomise, snapshot, tokens

MODELS = {
    "encoder": (Encoder, dict(modules_to_save=["classifier"])),
    "fused": (FusedEncoder, dict(fused_blocks={"qkv": (3, (0, 2))})),
    "grouped-query": (GroupedQueryBlock, dict(target_modules=["q_proj", "v_proj", "down_proj"])),
    "tied-and-shared": (TiedModel, dict(target_modules=["first", "second", "head"])),
}


def adapted(make, settings):
    return randomise(apply_genft(make().eval(), GenFTConfig(shared_dim=2, specific_dim=1, **settings)))


@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
@pytest.mark.parametrize("make, settings", MODELS.values(), ids=MODELS)
def test_update_stays_in_plain_layers(make, settings, merged):
    plain = make().eval()
    model = adapted(make, settings)
    expected = model(tokens())
    if merged:
        merge(model)
    assert remove_genft(model, keep_update=True) is model
    assert torch.allclose(model(tokens()), expected, rtol=1e-4, atol=1e-5)
    before, after = snapshot(plain), snapshot(model)
    for what in ("keys", "classes", "requires_grad", "training", "attributes"):
        assert after[what] == before[what], what
    plain.load_state_dict(model.state_dict())  # as a checkpoint without this package
    if make is not TiedModel:  # the embedding keeps W, so a model that ties the two cannot hold both
        assert torch.allclose(plain(tokens()), expected, rtol=1e-4, atol=1e-5)


def test_update_goes_by_default():
    torch.manual_seed(3)
    model = adapted(GroupedQueryBlock, MODELS["grouped-query"][1])
    torch.manual_seed(3)
    assert torch.equal(remove_genft(merge(model))(tokens()), GroupedQueryBlock().eval()(tokens()))


def test_update_that_cannot_be_kept_changes_nothing(monkeypatch):
    model = adapted(*MODELS["encoder"])
    with disabled(model), pytest.raises(RuntimeError, match="disabled"):
        remove_genft(model, keep_update=True)
    before = snapshot(model)
    layers = [layer for layer in model.modules() if isinstance(layer, GenFTLinear)]

    def fail():
        raise torch.OutOfMemoryError("no room for dW")

    monkeypatch.setattr(layers[-1], "merge", fail)
    with pytest.raises(torch.OutOfMemoryError):
        remove_genft(model, keep_update=True)
    monkeypatch.undo()
    assert snapshot(model) == before


@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
@pytest.mark.filterwarnings("ignore:adapted, but not called")
def test_a_layer_at_a_second_path_that_was_not_adapted_keeps_its_weight(merged):
    settings = GenFTConfig(shared_dim=2, specific_dim=1, target_modules=["first"])
    model = TiedModel().eval()
    linear, bits = model.first, model.first.weight.detach().clone()
    randomise(apply_genft(model, settings))
    updated = model.first.weight + model.first.delta_weight()
    if merged:
        merge(model)
    remove_genft(model, keep_update=True)
    assert torch.allclose(model.first.weight, updated) and not torch.allclose(model.first.weight, bits, atol=1e-3)
    assert model.second is linear and torch.equal(model.second.weight, bits) and type(model.first) is type(linear)

    model = TiedModel().eval()
    before = snapshot(model)
    randomise(apply_genft(model, settings))
    assert snapshot(remove_genft(model)) == before and model.first is model.second
