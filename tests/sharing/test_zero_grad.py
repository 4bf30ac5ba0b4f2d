"""`accumulate` beside `zero_grad` and other terms of the loss, in any order: gradients are as without it."""

import contextlib
import random

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from genft_kernels import GenFTConfig, accumulate, apply_genft
from genft_kernels._torch_private import when_backward_ends
from genft_kernels.sharing.accumulate import Accumulation
from tests.helpers.tiny_models import randomise


class Chain(nn.Module):
    """Three adapted layers, the second of which a forward may leave out or recompute in backward."""

    def __init__(self, transform="both", zero_delta=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)).double()
        sizes = dict(shared_dim=2, specific_dim=1, transform=transform, zero_delta=zero_delta)
        apply_genft(self, GenFTConfig(**sizes, target_modules=["0", "1", "2"]))
        if not zero_delta:
            randomise(self)
        self.x = torch.randn(4, 8, dtype=torch.float64)
        self()  # the first forward, which warns of layers that are left out

    def forward(self, second="runs"):
        x = self.layers[0](self.x)
        if second == "runs":
            x = self.layers[1](x)
        elif second == "recomputed":
            x = checkpoint(self.layers[1], x, use_reentrant=True)
        return self.layers[2](x).square().sum()

    def trained(self):
        return [p for p in self.parameters() if p.requires_grad]

    def penalty(self, weight):
        return weight * sum(p.square().sum() for p in self.trained())


STEPS = {
    "loss": lambda model: model().backward(),
    "part": lambda model: model("left out").backward(),
    "recomputed": lambda model: model("recomputed").backward(),
    "penalty": lambda model: model.penalty(1.0).backward(),
    "one penalty": lambda model: model.trained()[1].square().sum().backward(),
    "no penalty": lambda model: model.penalty(0.0).backward(),
    "both": lambda model: (model() + model.penalty(0.5)).backward(),
    "both, no penalty": lambda model: (model("recomputed") + model.penalty(0.0)).backward(),
    "clip": lambda model: nn.utils.clip_grad_norm_(model.trained(), 1e9),  # which multiplies by one
    "clear": lambda model: model.zero_grad(),
    "zero": lambda model: model.zero_grad(set_to_none=False),
    "clear own": lambda model: model.layers.zero_grad(),
    "zero own": lambda model: model.layers.zero_grad(set_to_none=False),
    "clear shared": lambda model: model.genft_generators.zero_grad(),
    "zero shared": lambda model: model.genft_generators.zero_grad(set_to_none=False),
}


def compare(steps, before=(), **settings):
    """The gradients after some steps, within `accumulate` and without it."""
    found = []
    for context in (contextlib.nullcontext, accumulate):
        model = Chain(**settings)
        for step in before:
            STEPS[step](model)
        with context(model):
            for step in steps:
                STEPS[step](model)
        found.append([torch.zeros_like(p) if p.grad is None else p.grad for p in model.trained()])
    for expected, actual in zip(*found, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-9), (before, steps)


@pytest.mark.parametrize("transform", ["both", "column", "row", "sum"])
def test_any_order_of_steps(transform):
    choices = random.Random(transform)
    for _ in range(15):
        before = choices.choices([(), ("loss",), ("loss", "zero")])[0]
        compare(choices.choices(list(STEPS), k=choices.randint(2, 6)), before, transform=transform)


@pytest.mark.parametrize("clear", ["clear", "zero"])
@pytest.mark.parametrize("last", ["both", "penalty", "one penalty"])
def test_zero_grad_before_a_term_of_the_parameters_themselves(clear, last):
    compare(["loss", clear, last])


@pytest.mark.parametrize("of", ["own", "shared"])
@pytest.mark.parametrize("clear", ["clear", "zero"])
@pytest.mark.parametrize("last", ["part", "recomputed", "penalty", "both", None])
def test_zero_grad_of_some_leaves_the_sums_of_others(last, clear, of):
    compare(["loss", f"{clear} {of}", *filter(None, [last])])
    compare(["part", f"{clear} {of}", "loss", clear, *filter(None, [last])], before=["loss"])


def test_zeros_that_lie_in_one_tensor_with_others_are_no_zero_grad():
    """Gradients of one generation are views of stacks: what is added to one counts as a change of all."""
    compare(["loss", "no penalty", "loss"], before=["loss", "zero"], transform="column")
    compare(["loss", "penalty", "loss"], before=["loss", "zero"], transform="column", zero_delta=True)


@pytest.mark.parametrize("before", [(), ("loss",), ("loss", "zero")], ids=["none", "values", "zeros"])
@pytest.mark.parametrize("term", [(), ("no penalty",), ("both, no penalty",)], ids=["", "zeros", "zeros within"])
def test_zeros_that_are_scaled_are_no_zero_grad(term, before):
    compare(["loss", *term, "clip", "loss"], before)
    compare(["loss", *term, "clip", "zero", "part"], before, transform="column")


def test_zeros_that_came_before_a_pass_within_the_pass_are_no_zero_grad():
    compare(["loss", "both, no penalty"])


@pytest.mark.parametrize("within", [False, True], ids=["", "accumulate"])
def test_gradients_that_a_hook_takes_away_are_no_zero_grad(within):
    """As of an optimizer that steps within the backward."""
    model = Chain()
    expected = torch.autograd.grad(2 * model() + model.penalty(1.0), model.trained())
    taken = {p: torch.zeros_like(p) for p in model.trained()}

    def take(parameter):
        taken[parameter] += parameter.grad
        parameter.grad = None

    for parameter in model.trained():
        parameter.register_post_accumulate_grad_hook(take)
    with accumulate(model) if within else contextlib.nullcontext():
        for step in ("loss", "penalty", "loss"):
            STEPS[step](model)
    for actual, wanted in zip(taken.values(), expected, strict=True):
        assert torch.allclose(actual, wanted, rtol=1e-9)


def test_zero_grad_after_a_backward_that_failed():
    model = Chain()
    expected = torch.autograd.grad(model(), model.trained())

    def fail(grad):
        raise InterruptedError

    with accumulate(model):
        loss = model()
        with contextlib.suppress(InterruptedError):
            product = model.layers[0](model.x)
            product.register_hook(fail)
            (model.layers[2](product).sum() + model.penalty(0.5)).backward()
        model.zero_grad()
        loss.backward()
    for actual, wanted in zip([p.grad for p in model.trained()], expected, strict=True):
        assert torch.allclose(actual, wanted, rtol=1e-9)


def test_a_flush_that_ends_a_pass_knows_what_the_pass_has_added():
    """As `AccumulateCallback` does it, which asks for its turn before anybody else."""
    model = Chain()
    expected = torch.autograd.grad(2 * model(), model.trained())
    accumulation = Accumulation(model)
    accumulation.start()
    model().backward()
    loss = model() + model.penalty(0.0)
    loss.register_hook(lambda grad: when_backward_ends(accumulation.flush))
    loss.backward()
    for actual, wanted in zip([p.grad for p in model.trained()], expected, strict=True):
        assert torch.allclose(actual, wanted, rtol=1e-9)
