"""State dicts across merging: loaded right, or refused with the layer named; never an update added twice."""

import copy
import io

import pytest
import torch

from genft_kernels import GenFTConfig, apply_genft, merge, remove_genft, unmerge
from tests.helpers.tiny_models import Encoder, randomise, snapshot, tokens

QUERY = "layers.0.attention.query"


def adapted():
    torch.manual_seed(5)
    return randomise(apply_genft(Encoder().eval(), GenFTConfig(shared_dim=2, specific_dim=1)))


def saved(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_merged_state_is_not_loaded_into_an_adapted_model(strict, assign):
    model = adapted()
    expected = model(tokens())
    with pytest.raises(RuntimeError, match=f"holds '{QUERY}' merged, so its update would be added twice"):
        model.load_state_dict(saved(merge(adapted())), strict=strict, assign=assign)
    assert torch.equal(model(tokens()), expected)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("merged", [False, True], ids=["of an adapted", "of a merged"])
def test_no_state_is_loaded_into_a_merged_model(merged, strict):
    model, other = merge(adapted()), adapted()
    expected = model(tokens())
    with pytest.raises(RuntimeError, match=f"'{QUERY}' is merged: call unmerge"):
        model.load_state_dict(saved(merge(other) if merged else other), strict=strict)
    assert torch.equal(model(tokens()), expected)
    unmerge(model)
    assert torch.equal(model(tokens()), adapted()(tokens()))


def test_a_merged_state_is_that_of_a_plain_model_but_for_the_adapter():
    model = merge(adapted())
    plain = Encoder().eval()
    with pytest.raises(RuntimeError, match=f"Unexpected key.*{QUERY}.merged"):
        plain.load_state_dict(saved(model))
    assert not plain.load_state_dict(saved(model), strict=False).missing_keys
    assert torch.allclose(plain(tokens()), model(tokens()), atol=1e-6)


def test_an_unmerged_state_has_no_mark_and_goes_round():
    model = adapted()
    keys = list(model.state_dict())
    merge(model)
    assert set(model.state_dict()) - set(keys) == {
        f"layers.{n}.attention.{name}.merged" for n in (0, 1) for name in ("query", "value")
    }
    unmerge(model)
    assert list(model.state_dict()) == keys
    before, other = snapshot(model), randomise(adapted(), 1.0)
    other.load_state_dict(saved(model))
    assert snapshot(other)["bits"] == before["bits"]


def test_an_updated_plain_state_lacks_the_adapter_by_name():
    plain = remove_genft(adapted(), keep_update=True)
    with pytest.raises(RuntimeError, match="Missing key.*genft_generators.8x8"):
        adapted().load_state_dict(saved(plain))


def test_a_merged_model_is_copied_merged():
    model = merge(adapted())
    assert torch.equal(copy.deepcopy(model)(tokens()), model(tokens()))
