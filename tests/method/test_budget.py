"""`GenFTConfig.for_budget`: the units that a number of trained parameters pays for."""

import pytest
import torch
from torch import nn

from genft_kernels import GenFTConfig, apply_genft, trainable_summary
from tests.helpers.tiny_models import Encoder, GroupedQueryBlock


def stack(layers, width):
    return nn.ModuleList(nn.Linear(width, width) for _ in range(layers))


EVERY = dict(target_modules="[0-9]+")


@pytest.mark.parametrize(
    "layers, parameters, units",
    [
        (12, 73_728, (12, 7)),  # the study: MiniLM
        (24, (12 + 24 * 7) * 768, (12, 7)),
        (24, (24 + 24 * 5) * 768, (24, 5)),  # 5.6 specific ones in proportion
        (1, 19 * 768, (12, 7)),
        (12, 768, (1, 0)),
        (12, 12 * 768 - 1, (11, 0)),
        (12, 12 * 768, (0, 1)),  # as LoRA of rank 1: one of each layer's own before 12 shared ones
        (12, 14 * 768, (2, 1)),
        (12, 25 * 768, (13, 1)),
    ],
)
def test_units_of_one_shape(layers, parameters, units):
    config = GenFTConfig.for_budget(stack(layers, 384), parameters, **EVERY)
    assert (config.shared_dim, config.specific_dim) == units
    fast = GenFTConfig.preset("fast", shared_dim=units[0], specific_dim=units[1], **EVERY)
    assert config == fast


def test_warning_of_the_preset_is_given_once():
    with pytest.warns(UserWarning, match="specific units can never train") as caught:
        GenFTConfig.for_budget(stack(2, 32), 2000, "vtab", **EVERY)
    assert [each.filename for each in caught] == [__file__]


@pytest.mark.parametrize(
    "settings",
    [
        dict(), dict(bias=True), dict(transform="row"), dict(transform="row", bias=True), dict(transform="sum"),
        dict(transform="both", zero_delta=True), dict(transform="both", zero_delta=True, bias=True),
        dict(transform="both", zero_delta=True, tie_specific=False),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("model", [Encoder, lambda: nn.Sequential(GroupedQueryBlock(), GroupedQueryBlock())])
@pytest.mark.filterwarnings("ignore:.*k = shared_dim")
def test_the_total_is_within_one_shared_unit_of_the_budget(model, settings):
    def trained(**sizes):
        summary = trainable_summary(apply_genft(model(), GenFTConfig.preset("fast", **settings, **sizes)))
        return summary["generators"] + summary["specific"]

    for parameters in (200, 333, 512, 1000):
        chosen = GenFTConfig.for_budget(model(), parameters, **settings)
        s, r = chosen.shared_dim, chosen.specific_dim
        assert trained(shared_dim=s, specific_dim=r) <= parameters < trained(shared_dim=s + 1, specific_dim=r)
        assert 7 * s >= 12 * r - 7 or r == 1
        two_stages = settings.get("transform") == "both"
        assert r or two_stages or parameters < trained(shared_dim=0, specific_dim=1)
        assert parameters < trained(shared_dim=-(-12 * (r + 1) // 7), specific_dim=r + 1)


@pytest.mark.parametrize(
    "preset, parameters, units",
    [
        ("wegeft", 19 * 768, (19, 0)),
        ("fast-both", 36_864, (12, 2)),
        ("fast", 36_864, (12, 3)),
        ("fast-both", 12 * 768, (6, 0)),
        ("fast-sum", 24 * 768, (0, 1)),
    ],
)
def test_a_preset_keeps_its_proportion_and_settings(preset, parameters, units):
    config = GenFTConfig.for_budget(stack(12, 384), parameters, preset, **EVERY)
    assert config == GenFTConfig.preset(preset, shared_dim=units[0], specific_dim=units[1], **EVERY)


@pytest.mark.filterwarnings("ignore:.*specific units can never train")
def test_a_preset_that_trains_shared_units_alone_has_some():
    config = GenFTConfig.for_budget(stack(12, 384), 12 * 768, "vtab", **EVERY)
    assert (config.shared_dim, config.specific_dim) == (6, 0)


def test_modules_to_save_are_not_counted():
    with_head = GenFTConfig.for_budget(Encoder(), 400, modules_to_save=["classifier"])
    assert with_head.modules_to_save == ("classifier",)
    assert with_head.hidden_dim == GenFTConfig.for_budget(Encoder(), 400).hidden_dim


def test_the_model_is_left_as_it_is():
    torch.manual_seed(0)
    model = Encoder()
    before = {name: (type(module), module.training) for name, module in model.named_modules()}
    GenFTConfig.for_budget(model, 400)
    assert before == {name: (type(module), module.training) for name, module in model.named_modules()}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_smallest_budget_is_named_where_parameters_are_too_few():
    message = "parameters=767 are too few: the smallest adapter of these 12 layers has 768, one shared unit a shape"
    with pytest.raises(ValueError, match=message):
        GenFTConfig.for_budget(stack(12, 384), 767, **EVERY)
    with pytest.raises(ValueError, match="smallest adapter of these 2 layers has 24,"):
        GenFTConfig.for_budget(GroupedQueryBlock(), 23, transform="row")


@pytest.mark.parametrize("parameters", [0, -1, 2.5, True, "9k"])
def test_a_budget_that_is_no_number_is_refused(parameters):
    with pytest.raises(ValueError, match="parameters must be an integer of at least 1"):
        GenFTConfig.for_budget(Encoder(), parameters)


def test_sizes_that_it_chooses_cannot_be_given():
    with pytest.raises(TypeError, match="specific_dim is what for_budget chooses"):
        GenFTConfig.for_budget(Encoder(), 1000, specific_dim=2)
    with pytest.raises(ValueError, match="target_modules matched nothing"):
        GenFTConfig.for_budget(nn.ReLU(), 1000)
