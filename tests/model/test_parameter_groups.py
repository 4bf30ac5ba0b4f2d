"""Optimizer groups: which parameter trains at which rate, none left out and none twice."""

import copy
import math

import pytest
import torch
from torch import nn

from genft_kernels import GenFTConfig, GenFTGenerator, GenFTLinear, apply_genft, parameter_groups
from tests.helpers.tiny_models import VOCABULARY, Encoder, FusedEncoder, GroupedQueryBlock


def adapted(model=None, **settings):
    torch.manual_seed(0)
    return apply_genft(model or Encoder(), GenFTConfig(**{"shared_dim": 3, "specific_dim": 2, **settings}))


def rates(model, groups):
    """The rate of every parameter of the groups by its name in the model; each is in one of them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [(names[id(parameter)], group["lr"]) for group in groups for parameter in group["params"]]
    found = dict(listed)
    assert len(found) == len(listed)
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return found


def test_shared_units_heads_and_the_rest_have_their_rates():
    model = adapted(modules_to_save=["classifier"])
    model.embedding.weight.requires_grad_(True)
    groups = parameter_groups(model, 4e-3, head_lr=1e-2, weight_decay=0.1)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("own", 0.1), ("heads", 0.1), ("shared 8x8", 0.1),
    ]  # fmt: skip
    for name, rate in rates(model, groups).items():
        shared, head = name.startswith("genft_generators."), name.startswith("classifier.")
        assert rate == (4e-3 / math.sqrt(4) if shared else 1e-2 if head else 4e-3), name


def test_defaults_are_one_rate_but_for_shared_units():
    model = adapted(modules_to_save=["classifier"])
    own, heads, shared = parameter_groups(model, 1.0)
    assert (own["lr"], heads["lr"], shared["lr"]) == (1.0, 1.0, 0.5)
    assert {group["weight_decay"] for group in (own, heads, shared)} == {0.0}
    assert [group["lr"] for group in parameter_groups(model, 1.0, shared_lr_factor=1.0)] == [1.0, 1.0, 1.0]


def test_every_shape_has_the_factor_of_its_own_layers():
    model = nn.Sequential(*(GroupedQueryBlock() for _ in range(3)), nn.Linear(8, 4))
    adapted(model, specific_dim=1, target_modules=["q_proj", "v_proj", "3"])
    found = {group["name"]: group["lr"] for group in parameter_groups(model, 1.0)}
    assert found == {"own": 1.0, "shared 8x8": 1 / math.sqrt(3), "shared 8x4": 1 / math.sqrt(4)}


def test_each_adapted_block_of_a_fused_weight_counts():
    model = adapted(FusedEncoder(), fused_blocks={"qkv": (3, (0, 2))})
    assert {group["name"]: group["lr"] for group in parameter_groups(model, 1.0)}["shared 8x8"] == 1 / math.sqrt(2)


@pytest.mark.parametrize("wrap", [lambda m: nn.ModuleDict({"inner": m}), copy.deepcopy, torch.compile])
def test_wrapped_models_are_as_the_model(wrap):
    model = adapted(modules_to_save=["classifier"])
    whole = wrap(model)
    found = rates(whole, parameter_groups(whole, 1.0, head_lr=3.0))
    assert sorted(found.values()) == sorted(rates(model, parameter_groups(model, 1.0, head_lr=3.0)).values())
    assert set(found.values()) == {0.5, 1.0, 3.0}


def test_a_model_of_layers_made_by_hand():
    config = GenFTConfig(shared_dim=3, specific_dim=2)
    generator = GenFTGenerator(8, 8, config)
    model = nn.Sequential(*(GenFTLinear(8, 8, generator=generator) for _ in range(4)))
    found = rates(model, parameter_groups(model, 1.0))
    assert {rate for name, rate in found.items() if "generator" in name} == {0.5}
    assert {rate for name, rate in found.items() if "generator" not in name} == {1.0}


def test_frozen_shared_units_are_in_no_group():
    model = adapted()
    model.genft_generators.requires_grad_(False)
    assert [group["name"] for group in parameter_groups(model, 1.0)] == ["own"]


@pytest.mark.parametrize(
    "options, culprit",
    [
        (dict(lr=-1.0), "lr"),
        (dict(lr=float("nan")), "lr"),
        (dict(lr="1e-3"), "lr"),
        (dict(lr=None), "lr"),
        (dict(lr=1.0, head_lr=-1.0), "head_lr"),
        (dict(lr=1.0, shared_lr_factor=float("inf")), "shared_lr_factor"),
        (dict(lr=1.0, weight_decay=None), "weight_decay"),
    ],
)
def test_a_bad_number_is_named(options, culprit):
    with pytest.raises(ValueError, match=rf"^{culprit} must be a finite number of at least 0"):
        parameter_groups(adapted(modules_to_save=["classifier"]), **options)


def test_a_rate_for_heads_needs_heads():
    with pytest.raises(ValueError, match="head_lr is given, and the model has no modules_to_save"):
        parameter_groups(adapted(), 1.0, head_lr=2.0)


def test_a_model_without_layers_or_without_anything_to_train_is_refused():
    with pytest.raises(ValueError, match="no GenFT layers"):
        parameter_groups(Encoder(), 1.0)
    with pytest.raises(ValueError, match="nothing in the model trains"):
        parameter_groups(adapted().requires_grad_(False), 1.0)
    with pytest.raises(TypeError, match="model must be a Module"):
        parameter_groups([nn.Parameter(torch.zeros(1))], 1.0)


def test_shared_units_outside_of_the_model_are_missed():
    model = adapted()
    with pytest.raises(ValueError, match="shared units of layer '0.attention.query' are not in the model"):
        parameter_groups(model.layers, 1.0)


def test_a_step_moves_each_parameter_by_its_rate():
    model = adapted(transform="column", zero_delta="down", modules_to_save=["classifier"])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1e-3, head_lr=1e-2)
    optimizer = torch.optim.Adam(groups)
    model(torch.arange(12).reshape(3, 4) % VOCABULARY).square().sum().backward()
    optimizer.step()
    for name, rate in rates(model, groups).items():
        parameter = model.get_parameter(name)
        moved = (parameter.detach() - before[name]).abs().max().item()
        # Adam's first step is as long as the rate wherever there is a gradient; ups have none while downs are zero.
        assert moved == (0 if name.endswith("_up") else pytest.approx(rate, rel=0.02)), name


def test_peft_models():
    peft = pytest.importorskip("peft")
    from genft_kernels.integrations.peft import PeftGenFTConfig

    torch.manual_seed(0)
    settings = dict(shared_dim=3, specific_dim=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = peft.get_peft_model(Encoder(), PeftGenFTConfig(**settings))
    found = rates(model, parameter_groups(model, 1.0, head_lr=3.0))
    for name, rate in found.items():
        assert rate == (0.5 if "genft_shared" in name else 3.0 if "classifier" in name else 1.0), name
    assert set(found.values()) == {0.5, 1.0, 3.0}
    model.add_adapter("other", PeftGenFTConfig(**settings | {"target_modules": ["query"]}))
    model.set_adapter("other")
    found = rates(model, parameter_groups(model, 1.0, head_lr=3.0))
    assert set(found.values()) == {1 / math.sqrt(2), 1.0, 3.0} and all("other" in name for name in found)
    with pytest.raises(ValueError, match="are not in the model: pass the whole of it"):
        parameter_groups(model.base_model.model.layers, 1.0)


def test_the_trainer_takes_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = adapted(modules_to_save=["classifier"])
    groups = parameter_groups(model, 4e-3, head_lr=1e-2)
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model, arguments, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups}))
    optimizer = trainer.create_optimizer()
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [
        ("own", 4e-3), ("heads", 1e-2), ("shared 8x8", 2e-3),
    ]  # fmt: skip
