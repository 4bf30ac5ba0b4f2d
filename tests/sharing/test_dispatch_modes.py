"""Listeners to the dispatcher: selective checkpointing, FLOP counters, fake tensors."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from genft_kernels import GenFTConfig, GenFTLinear, _torch_private, accumulate, apply_genft
from tests.helpers.adapted_models import adapted, assert_close, generations, gradients, groups, loss_of, train
from tests.helpers.tiny_models import Encoder, tokens

aten, genft = torch.ops.aten, torch.ops.genft
POLICIES = {
    "save-nothing": lambda op: False,
    "save-everything": lambda op: True,
    "save-mul": lambda op: op is aten.mul.Tensor,
    "save-products": lambda op: op in (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.mul.Tensor),
    "save-ours": lambda op: op in (genft.linear.default, genft.column.default),
    "save-all-but-cheap": lambda op: op not in (aten.gelu.default, aten.add.Tensor, aten.view.default),
}
SETTINGS = {
    "": {},
    "tiled": dict(outer_activation="gelu", bias=True),
    "dropout": dict(dropout=0.3),
    "row-dropout": dict(transform="row", dropout=0.3),
}


def selective(policy):
    def decide(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if policy(op) else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, decide)


def train_checkpointed(model, policy, seed=5) -> dict:
    """Gradients with every block of two layers recomputed in backward."""
    torch.manual_seed(seed)
    x = model.embedding(tokens())
    for block in (model.layers[:2], model.layers[2:]):
        x = checkpoint(nn.Sequential(*block), x, use_reentrant=False, context_fn=selective(policy))
    model.classifier(x.mean(1)).square().sum().backward()
    return gradients(model)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_selective_checkpointing_gives_the_gradients_of_none(settings, policy):
    model = adapted(partial(Encoder, layers=4), settings).train()
    expected = train_checkpointed(model, lambda op: False)
    if not settings.get("dropout"):
        assert_close(expected, train(model))
    assert_close(train_checkpointed(model, policy), expected)


def test_selective_checkpointing_still_has_one_generation_for_all_layers():
    model = adapted(partial(Encoder, layers=4)).train()
    train_checkpointed(model, POLICIES["save-mul"])
    assert generations(model) == 1


def test_selective_checkpointing_within_accumulate():
    model = adapted(partial(Encoder, layers=4)).train()
    expected = {name: 2 * gradient for name, gradient in train(model).items()}
    with accumulate(model):
        for _ in range(2):
            x = model.embedding(tokens())
            x = checkpoint(model.layers[0], x, use_reentrant=False, context_fn=selective(POLICIES["save-mul"]))
            x = checkpoint(
                nn.Sequential(*model.layers[1:]), x, use_reentrant=False, context_fn=selective(lambda _: True)
            )
            model.classifier(x.mean(1)).square().sum().backward()
    assert_close(gradients(model), expected)


def test_modes_around_selective_checkpointing_see_the_generation():
    model = adapted(partial(Encoder, layers=4)).train()
    with FlopCounterMode(display=False) as counter:
        train_checkpointed(model, POLICIES["save-mul"])
    counts = counter.get_flop_counts()["Global"]
    assert counts[genft.column] > 0 and counts[genft.row] > 0
    assert not _torch_private.dispatch_modes_active()


def layer_and_input(**settings):
    torch.manual_seed(0)
    layer = GenFTLinear(32, 48, config=GenFTConfig(shared_dim=4, specific_dim=2, zero_delta=False, **settings))
    return layer, torch.randn(5, 32, requires_grad=True)


@pytest.mark.parametrize(
    "settings, generated, forward, backward",
    [
        # By hand, in products of T x 32 x 48 and of k = 6 units.
        ({}, 32 * 48 * 6 + 6 * 6 * 80, 5 * (32 * 48 + 6 * 80), 5 * (32 * 48 + 2 * 6 * 80)),
        (
            dict(outer_activation="gelu"),
            32 * 48 * 6 + 2 * 32 * 48 * 6,
            32 * 48 * (5 + 6),
            32 * 48 * (2 * 5 + 3 * 6),
        ),
    ],
    ids=["factored", "tiled"],
)
def test_flop_counters_count_the_planned_products(settings, generated, forward, backward):
    layer, x = layer_and_input(**settings)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    counts = counter.get_flop_counts()["Global"]
    assert counts[genft.column] + counts[genft.row] == 2 * generated and counts[genft.linear] == 2 * forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    of_row = 2 * 6 * 6 * 80 if not settings else 32 * 48 * 5 * 6
    assert counts[genft.linear_backward] == 2 * backward
    assert counts[genft.column_backward] == 2 * 32 * 48 * 6 and counts[genft.row_backward] == 2 * of_row


def test_fake_tensors_pass_through_and_leave_nothing_behind():
    model = adapted().eval()
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.layers[0](torch.empty(2, 8, dtype=torch.float64))
        assert generations(model) == 0 and not any(groups(model)[0]._shares.values())
        y = model(tokens())
        assert type(y) is torch.Tensor and y.isfinite().all()
    loss_of(model).backward()


def test_a_model_under_fake_tensors_may_be_adapted_and_run():
    with FakeTensorMode():
        model = apply_genft(nn.Sequential(nn.Linear(8, 8)), GenFTConfig(shared_dim=2, target_modules=["0"]))
        assert model(torch.empty(3, 8)).shape == (3, 8)


def test_modes_within_a_selectively_checkpointed_region_see_what_it_does_not():
    caching, _ = create_selective_checkpoint_contexts([aten.mm.default])
    inner = FlopCounterMode(display=False)
    with FlopCounterMode(display=False) as outer, caching, inner:
        with _torch_private.hidden_from_selective_checkpointing():
            torch.ones(2, 2) @ torch.ones(2, 2)
        assert not caching.storage
    assert outer.get_total_flops() == inner.get_total_flops() == 16
