"""Checks of models that official checkpoints are loaded into, and of those that must stay as they were."""

import torch


def double(model):
    return model.double().eval()


def head_of(model):
    """A trained head: other values than the base model's, under the base model's names."""
    return {key: torch.randn(value.shape) for key, value in model.state_dict().items() if key.startswith("classifier.")}


def agree(mine, official, frozen):
    """Equal to the official answer, and the adapter matters: 1e-12 beside the size of the answer."""
    scale = official.abs().max()
    assert (mine - official).abs().max() <= 1e-12 * scale
    assert (official - frozen).abs().max() > 1e-3 * scale


def snapshot(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return state, grads, set(vars(model)), dict(model.named_modules())


def assert_untouched(model, before):
    state, grads, attributes, modules = snapshot(model)
    assert grads == before[1] and attributes == before[2] and modules == before[3]
    assert state.keys() == before[0].keys()
    assert all(torch.equal(state[key], before[0][key]) for key in state)
