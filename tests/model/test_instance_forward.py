"""Layers whose forward was replaced on the instance: accelerate's hooks go on working, anything else is refused."""

import copy

import pytest
import torch
from torch import nn

from genft_kernels import GenFTConfig, GenFTGenerator, GenFTLinear, apply_genft, remove_genft
from genft_kernels.instance_forward import brought_back
from tests.helpers.tiny_models import randomise, snapshot

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
CONFIG = GenFTConfig(shared_dim=2, specific_dim=1, target_modules=["0", "2"], zero_delta=False)


class Doubles(hooks.ModelHook):
    """Doubles what goes in, and counts."""

    calls = 0

    def pre_forward(self, module, x):
        self.calls += 1
        return (x * 2,), {}


def hooked(hook=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    hooks.add_hook_to_module(model[0], hook or Doubles())
    return model


@pytest.mark.parametrize("copied", [False, True])
def test_a_hook_of_accelerate_goes_along(copied):
    hook, x = Doubles(), torch.randn(3, 8)
    model = apply_genft(hooked(hook), CONFIG)
    if copied:
        model = copy.deepcopy(model)
        hook = model[0]._hf_hook
    first = model[0]
    expected = torch.nn.functional.linear(2 * x, first.weight + first.delta_weight(), first.bias)
    assert torch.allclose(first(x), expected, atol=1e-5) and hook.calls == 1 and isinstance(first, GenFTLinear)
    model(x).sum().backward()
    assert hook.calls == 2 and first.specific_down.grad.abs().sum() > 0


def test_hooks_are_where_they_were_after_removal():
    model = hooked()
    before, expected = snapshot(model), model(torch.ones(1, 8))
    randomise(apply_genft(model, CONFIG))
    remove_genft(model)
    assert snapshot(model) == before and torch.equal(model(torch.ones(1, 8)), expected)
    hooks.remove_hook_from_module(model, recurse=True)
    apply_genft(model, CONFIG)  # a bound method of the class is left on the instance


def test_a_hook_that_was_removed_meanwhile_does_not_come_back():
    model = apply_genft(hooked(), CONFIG)
    hooks.remove_hook_from_module(model, recurse=True)
    x = torch.randn(3, 8)
    expected = torch.nn.functional.linear(x, model[0].weight + model[0].delta_weight(), model[0].bias)
    assert torch.allclose(model[0](x), expected, atol=1e-5)
    remove_genft(model)
    assert torch.equal(model[0](x), torch.nn.functional.linear(x, model[0].weight, model[0].bias))


def test_a_hook_that_was_added_meanwhile_stays():
    model, hook = apply_genft(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), CONFIG), Doubles()
    hooks.add_hook_to_module(model[0], hook)
    remove_genft(model)
    x = torch.randn(3, 8)
    assert torch.equal(model[0](x), torch.nn.functional.linear(2 * x, model[0].weight, model[0].bias))
    assert hook.calls == 1


def test_a_forward_patched_by_hand_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    forward = model[2].forward
    model[2].forward = lambda x: forward(x) * 3
    before = snapshot(model)
    with pytest.raises(TypeError, match="target module '2': its forward was replaced on the instance"):
        apply_genft(model, CONFIG)
    assert snapshot(model) == before


def test_a_hook_over_a_patched_forward_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    forward = model[2].forward
    model[2].forward = lambda x: forward(x) * 3
    hooks.add_hook_to_module(model[2], Doubles())
    with pytest.raises(TypeError, match="target module '2': its forward was replaced on the instance"):
        apply_genft(model, CONFIG)


def test_brought_back_is_what_was_offloaded_and_all_goes_away_again():
    model = accelerate.cpu_offload(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), torch.device("cpu"))
    first, last = model[0], model[2]
    kinds = [p.device.type for p in model.parameters()]
    with brought_back(first, last):
        assert all(p.device.type == "cpu" for p in model.parameters())
    last._hf_hook.weights_map = {"weight": torch.zeros(4, 8)}  # no bias
    with pytest.raises(KeyError), brought_back(first, last):
        pass
    assert [p.device.type for p in model.parameters()] == kinds == ["meta"] * 4


def test_brought_back_calls_no_hook_that_has_offloaded_nothing():
    model, hook = hooked(), Doubles()
    with brought_back(*model):
        assert hook.calls == 0


def test_a_layer_made_by_hand_has_the_hook_too():
    linear, hook = nn.Linear(8, 8), Doubles()
    hooks.add_hook_to_module(linear, hook)
    layer = GenFTLinear.from_linear(linear, GenFTGenerator(8, 8, CONFIG))
    layer(torch.zeros(1, 8))
    assert hook.calls == 1
    linear.forward = lambda x: x
    with pytest.raises(TypeError, match="its forward was replaced on the instance"):
        GenFTLinear.from_linear(linear, GenFTGenerator(8, 8, CONFIG))
