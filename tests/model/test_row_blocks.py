"""Fused weights whose blocks differ in rows, as q, k and v do where several heads share keys and values."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genft_kernels import (
    GenFTConfig,
    GenFTGenerator,
    GenFTLinear,
    apply_genft,
    explain,
    merge,
    parameter_groups,
    reference,
    remove_genft,
    set_backend,
    trainable_summary,
    unmerge,
)
from genft_kernels.row_blocks import RowBlocks
from tests.helpers.model_cases import config
from tests.helpers.tiny_models import FusedGroupedQueryBlock, randomise, snapshot, tokens

ROWS = (8, 4, 4)


def adapted(adapts=(0, 2), **settings) -> nn.Module:
    torch.manual_seed(0)
    model = apply_genft(
        FusedGroupedQueryBlock().double(), config(fused_blocks={"qkv_proj": (ROWS, adapts)}, **settings)
    )
    return randomise(model)


def expected_delta(layer) -> torch.Tensor:
    """By the specification, block by block."""
    parts = [torch.zeros_like(part) for part in layer.frozen_weight.split(ROWS)]
    for update in layer.updates.values():
        for index in update.blocks.adapted:
            weight = layer.frozen_weight.split(ROWS)[index]
            parts[index] = reference.delta_weight(weight, update.parameters_of_generator(), update.config)
    return torch.cat(parts)


SETTINGS = {"": {}, "tiled": dict(outer_activation="gelu", bias=True), "column": dict(transform="column")}


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_each_size_of_blocks_has_a_generator_and_units(settings, backend):
    model = set_backend(adapted(**settings), backend)
    layer = model.qkv_proj
    assert sorted(model.genft_generators) == ["8x4", "8x8"]
    assert [update.blocks.adapted for update in layer.updates.values()] == [(0,), (2,)]
    delta, x = expected_delta(layer), torch.randn(3, 8, dtype=torch.float64)
    assert delta[:8].any() and not delta[8:12].any() and delta[12:].any()
    assert torch.equal(layer.delta_weight(), delta)
    assert torch.allclose(layer(x), F.linear(x, layer.weight + delta, layer.bias), rtol=1e-12)
    layer.train()(x).square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_blocks_of_one_size_share_units():
    layer = adapted((0, 1, 2)).qkv_proj
    assert [update.blocks.adapted for update in layer.updates.values()] == [(0,), (1, 2)]
    assert torch.equal(layer.delta_weight(), expected_delta(layer)) and layer.delta_weight()[8:12].any()
    assert "blocks=[0, 1, 2] of 8+4+4" in repr(layer)


def test_all_that_acts_on_a_model_reaches_every_size():
    model = adapted((0, 1, 2)).eval()
    answer, weight = model(tokens()), model.qkv_proj.weight
    merge(model)
    assert torch.allclose(model(tokens()), answer, rtol=1e-10) and model.qkv_proj.weight is not weight
    assert all(update.merged for update in model.qkv_proj.updates.values())
    unmerge(model)
    assert model.qkv_proj.weight is weight and torch.equal(model(tokens()), answer)
    names = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    own = sum(n for name, n in names.items() if name.startswith("qkv_proj."))
    assert any(".more_blocks.4." in name for name in names)
    summary = trainable_summary(model)
    assert (summary["specific"], summary["trainable"]) == (own, sum(names.values()))
    assert {id(p) for g in parameter_groups(model, 1.0) for p in g["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    assert "8x8: 1 layer " in explain(model) and "8x4: 1 layer " in explain(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.qkv_proj.weight.mul_(2)
    assert twin.qkv_proj.more_blocks["4"].layer is twin.qkv_proj and not torch.equal(twin(tokens()), answer)
    assert torch.equal(model(tokens()), answer)
    before = [p.clone() for p in model.qkv_proj.parameters()]
    model.qkv_proj.reset_parameters()
    changed = [not torch.equal(p, was) for p, was in zip(model.qkv_proj.parameters(), before, strict=True)]
    assert all(changed)


def test_removal_is_exact():
    model = FusedGroupedQueryBlock()
    before = snapshot(model)
    apply_genft(model, config(fused_blocks={"qkv_proj": (ROWS, (0, 2))}))
    remove_genft(model)
    assert snapshot(model) == before


def test_rows_that_are_not_the_weights_are_refused_before_anything_changes():
    model = FusedGroupedQueryBlock()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"target module 'qkv_proj': its 16 rows are not those .* 8\+4$"):
        apply_genft(model, config(fused_blocks={"qkv_proj": ((8, 4), (0,))}))
    with pytest.raises(ValueError, match="'qkv_proj': its 16 rows cannot be cut into 3 equal blocks"):
        apply_genft(model, config(fused_blocks={"qkv_proj": (3, (0,))}))
    assert snapshot(model) == before


def test_blocks_of_several_sizes_need_a_generator_each():
    linear, settings = nn.Linear(8, 16), config()
    first, second = GenFTGenerator(8, 8, settings), GenFTGenerator(8, 4, settings)
    with pytest.raises(ValueError, match="blocks of 8 and of 4 rows need a generator each"):
        GenFTLinear.from_linear(linear, first, blocks=(ROWS, (0, 2)))
    layer = GenFTLinear.from_linear(linear, first, blocks=(ROWS, (0,)))
    for blocks in ((ROWS, (0,)), ((8, 4, 2, 2), (1,)), (4, (1,))):
        with pytest.raises(ValueError, match="blocks .* beside blocks|the generator is for"):
            layer.adapt_more(second, blocks)
    layer.adapt_more(second, (ROWS, (1,)))
    with pytest.raises(ValueError, match="beside blocks"):
        layer.adapt_more(second, (ROWS, (1, 2)))


@pytest.mark.parametrize("cut", [(), (8, 0), (8, -4), (8, "4"), (8, 4.0), "88", True])
def test_rows_must_be_sizes(cut):
    with pytest.raises(ValueError, match="fused_blocks.'qkv'. must be .number of blocks, or the rows of each"):
        GenFTConfig(fused_blocks={"qkv": (cut, (0,))})


def test_settings_survive_json():
    settings = GenFTConfig(fused_blocks={"qkv": [[8, 4, 4], [2, 0]], "gate_up": (2, [1])})
    assert settings.fused_blocks == {"qkv": (ROWS, (0, 2)), "gate_up": (2, (1,))}
    assert settings.to_dict()["fused_blocks"] == {"qkv": [[8, 4, 4], [0, 2]], "gate_up": [2, [1]]}
    assert GenFTConfig.from_dict(settings.to_dict()) == settings
    assert isinstance(settings.fused_blocks["qkv"], RowBlocks)
