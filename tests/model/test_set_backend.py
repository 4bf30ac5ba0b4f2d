"""`set_backend`, and `load_adapter(backend=)`: which backend an adapted model computes by."""

import copy

import pytest
import torch
from torch import nn

from genft_kernels import GenFTConfig, apply_genft, explain, load_adapter, save_adapter, set_backend
from genft_kernels.adapted_model import adapted_layers

CONFIG = GenFTConfig(shared_dim=3, specific_dim=2, zero_delta=False, target_modules=["0", "2"])
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()


def backends_of(model: nn.Module) -> set[str]:
    return {layer.backend for layer in adapted_layers(model).values()}


def test_set_backend_reaches_every_layer_and_leaves_the_update_alone():
    model = apply_genft(plain(), CONFIG)
    before = model(X.double())
    assert set_backend(model, "reference") is model and backends_of(model) == {"reference"}
    torch.testing.assert_close(model(X.double()), before, rtol=1e-12, atol=1e-12)


def test_set_backend_by_name_never_becomes_another():
    model = set_backend(apply_genft(plain().float(), CONFIG), "triton")
    with pytest.raises(RuntimeError, match="'triton' cannot run on cpu"):
        model(X)


def test_explain_tells_which_layers_have_a_backend_by_name():
    model = apply_genft(plain(), CONFIG)
    auto = explain(model)
    assert auto.startswith('backend="auto" on cpu: eager')
    lines = explain(set_backend(model, "eager")).splitlines()
    assert lines == ['backend="eager", by name, in 2 of 2 layers', *auto.splitlines()]
    model[0].backend = "reference"
    assert explain(model).splitlines()[:2] == [
        'backend="reference", by name, in 1 of 2 layers',
        'backend="eager", by name, in 1 of 2 layers',
    ]
    assert explain(set_backend(model, "auto")) == auto


@pytest.mark.parametrize("name", ["cudnn", "", None, 3])
def test_set_backend_names_a_bad_name_and_changes_nothing(name):
    model = apply_genft(plain(), CONFIG, backend="eager")
    with pytest.raises(ValueError, match="backend must be one of auto"):
        set_backend(model, name)
    assert backends_of(model) == {"eager"}


def test_set_backend_needs_an_adapter():
    with pytest.raises(RuntimeError, match="no GenFT adapter"):
        set_backend(plain(), "eager")


@pytest.mark.parametrize("given, fresh, used", [("eager", "eager", "eager"), (None, "auto", "reference")])
def test_load_adapter_sets_the_backend_it_is_given(given, fresh, used, tmp_path):
    model = apply_genft(plain(), CONFIG, backend="reference")
    save_adapter(model, tmp_path)
    assert backends_of(load_adapter(plain(), tmp_path, backend=given)) == {fresh}
    assert backends_of(load_adapter(copy.deepcopy(model), tmp_path, backend=given)) == {used}


def test_load_adapter_looks_at_the_backend_before_it_changes_anything(tmp_path):
    save_adapter(apply_genft(plain(), CONFIG), tmp_path)
    model = plain()
    with pytest.raises(ValueError, match="backend must be one of auto"):
        load_adapter(model, tmp_path, backend="gpu")
    assert not adapted_layers(model)
