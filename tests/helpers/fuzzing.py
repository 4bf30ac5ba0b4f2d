"""Choices of the stateful fuzz (settings, optimizers, changes, failures midway), how it judges a model, and its rules
for parts of a model and of a loss.
"""

from __future__ import annotations

import contextlib

import hypothesis.strategies as st
import torch
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from torch import nn

from genft_kernels import GenFTConfig, accumulate
from genft_kernels.activations import ACTIVATIONS
from tests.helpers.oracle import WIDTH, Oracle

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02),
}
CHANGES = {
    "in place": lambda p, new: p.copy_(new),
    "data, in place": lambda p, new: p.data.copy_(new),
    "data, replaced": lambda p, new: setattr(p, "data", new.clone()),
    "numpy's view": lambda p, new: p.numpy(force=True).__setitem__(..., new.numpy()),
    "storage": lambda p, new: p.untyped_storage().copy_(new.untyped_storage()),
    "vector": lambda p, new: nn.utils.vector_to_parameters(new.flatten(), [p]),
}

ROUTES = st.sampled_from([(0,), (1,), (0, 1), (1, 0), (0, 0), (1, 0, 1)])
# Which of the model's parts `zero_grad` is called on.
CLEARED = {
    "all": lambda model: model,
    "own": lambda model: model.blocks,
    "shared": lambda model: model.genft_generators,
}
STEPS = st.one_of(
    ROUTES.map(lambda route: ("loss", route)),
    st.sampled_from([0.0, 0.5]).map(lambda weight: ("penalty", weight)),
    st.sampled_from(sorted(CLEARED)).map(lambda part: ("clear", part)),
    st.sampled_from(sorted(CLEARED)).map(lambda part: ("zero", part)),
)


@st.composite
def configs(draw):
    """Settings that suit every layer of the tower."""
    transform = draw(st.sampled_from(["both", "both", "column", "row", "sum"]))
    layout = draw(st.sampled_from(["in_out", "out_in"])) if transform == "both" else "in_out"
    names = st.sets(st.sampled_from(["query", "value", "fused", "down"]), min_size=1)
    targets = draw(names if layout == "in_out" else names.map(lambda found: found - {"down"} or {"query"}))
    return GenFTConfig(
        shared_dim=draw(st.integers(0, 2)),
        specific_dim=draw(st.integers(1, 2)),
        inner_activation=draw(st.sampled_from(ACTIVATIONS)),
        outer_activation=draw(st.sampled_from(["identity", *ACTIVATIONS])),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.0, 0.25])),
        bias=draw(st.booleans()),
        weight_ratio=draw(st.sampled_from([1.0, 2.0, "rms"])),
        ratio_scope=draw(st.sampled_from(["weight", "all"])),
        scaling=0.2,
        transform=transform,
        tie_specific=draw(st.booleans()),
        delta_layout=layout,
        zero_delta=False,
        target_modules=tuple(sorted(targets)),
        modules_to_save=draw(st.sampled_from([None, ("head",)])),
        fused_blocks={"fused": (3, draw(st.sampled_from([(0, 2), (1,)])))} if "fused" in targets else None,
    )


@contextlib.contextmanager
def failing(module, backward):
    """Within it, forward or backward of `module` raises, and the caller does not."""

    def fail(*arguments):
        raise InterruptedError

    def hook(module, inputs, output):
        output.register_hook(fail) if backward and output.requires_grad else fail()

    handle = module.register_forward_hook(hook)
    try:
        with contextlib.suppress(InterruptedError):
            yield
    finally:
        handle.remove()


# How far from float64, relative to the norm.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


class Subject(RuleBasedStateMachine):
    """A tower, what is known of it, and how it is judged.

    Beside `model`: its `config`, None where it is not adapted; whether it is `merged`; `frozen`, the weights that it
    must have; an `optimizer` (name, object) of its parameters, and a state dict that was `kept`, or None.
    """

    def adapted(self):
        return self.config is not None

    def free(self):
        """Adapted, and not merged."""
        return self.config is not None and not self.merged

    def bare(self):
        return self.config is None

    @property
    def dtype(self):
        return self.model.head.weight.dtype

    def trained(self):
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def input(self):
        return torch.randn(3, WIDTH, dtype=torch.float64).to(self.dtype).requires_grad_()

    def assert_close(self, actual, expected, what, autocast=False, floor=1e-3):
        tolerance = max(TOLERANCES[self.dtype], TOLERANCES[torch.bfloat16] if autocast else 0)
        error, size = (actual.detach().double() - expected.detach()).norm(), expected.detach().norm()
        assert error <= tolerance * (size + floor), f"{what}: off by {error:.3g}, of {size:.3g}"

    def forget(self):
        self.config = self.optimizer = self.kept = None

    def put_aside(self, name):
        """Whether a tensor of the frozen model is not in the model now: that of a module to save follows when used."""
        return self.adapted() and self.config.modules_to_save is not None and name.startswith("head.")

    def take_up(self):
        """Use of what was put aside, in the model's dtype."""
        self.frozen = {name: tensor.to(self.dtype) for name, tensor in self.frozen.items()}

    def evaluated(self, x, context=torch.no_grad):
        """The model's answer; in evaluation where it needs that, else in the mode that it is in."""
        training = self.model.training
        if self.merged or (self.config and self.config.dropout):
            self.model.eval()
        with context():
            y = self.model(x)
        if self.model.training != training:
            self.model.train(training)
        return y

    def gradients_follow(self, autocast=False):
        """Whether they are near those in float64: near a kink rounding decides them, in plain PyTorch as well."""
        kinks = {"relu", "leaky_relu"} & {self.config.inner_activation, self.config.outer_activation}
        return not kinks or (self.dtype == torch.float64 and not autocast)

    def assert_gradients(self, expected, autocast=False):
        scale = max(gradient.norm() for gradient in expected.values())
        for name, parameter in self.trained().items():
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.assert_close(found, expected[name], f"gradient of {name}", autocast, scale)

    def step(self, name):
        """A step of an optimizer by name: the one at hand if it is the same."""
        if self.dtype == torch.float16:
            name = "SGD"  # Adam's epsilon is zero there
        if self.optimizer is None or self.optimizer[0] != name:
            self.optimizer = name, OPTIMIZERS[name](self.trained().values())
        nn.utils.clip_grad_norm_(self.trained().values(), 1.0)
        self.optimizer[1].step()


class Parts(Subject):
    """Forwards of some blocks alone, and losses of several terms."""

    @precondition(Subject.free)
    @rule(
        route=ROUTES,
        context=st.sampled_from([torch.no_grad, torch.inference_mode, *[contextlib.nullcontext] * 3]),
        backward=st.booleans(),
    )
    def go_through_a_part(self, route, context, backward):
        """In the mode that the model is in; the result is judged, and dropped or sent backward."""
        x, oracle = self.input(), Oracle(self.model, self.frozen)
        with context():
            y = self.model(x, route)
        if self.config.dropout and self.model.training:
            return
        self.assert_close(y, oracle.output(x, route), "output of a part")
        if backward and y.requires_grad:
            self.model.zero_grad()
            wide = x.detach().double().requires_grad_()
            expected, (of_x,) = oracle.backward(oracle.output(wide, route).square().sum(), [wide])
            y.double().square().sum().backward()
            if self.gradients_follow():
                self.assert_gradients(expected)
                self.assert_close(x.grad, of_x, "gradient of x")

    @precondition(Subject.free)
    @rule(trains=st.booleans(), first=st.integers(0, 1))
    def freeze_or_thaw_what_is_shared(self, trains, first):
        """Between a forward of one part and one of the other; in evaluation, which keeps factors."""
        shared = dict(self.model.genft_generators.named_parameters(prefix="genft_generators"))
        if not set(self.trained()) - set(shared):
            return
        self.model.eval().genft_generators.requires_grad_(not trains)
        for route in ((0, 1), (first,)):
            self.model(self.input(), route)
        self.model.genft_generators.requires_grad_(trains)
        self.model.genft_generators.zero_grad()
        self.optimizer = None
        self.go_through_a_part((1 - first,), contextlib.nullcontext, True)

    @precondition(Subject.free)
    @rule(steps=st.lists(STEPS, min_size=2, max_size=6))
    def accumulate_terms(self, steps):
        """Losses, penalties on the parameters themselves and calls of `zero_grad`, in any order within `accumulate`."""
        if self.config.dropout:
            return
        self.model.zero_grad()
        expected = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.trained().items()}
        with accumulate(self.model):
            for step, value in steps:
                if step == "loss":
                    x, oracle = self.input(), Oracle(self.model, self.frozen)
                    self.model(x, value).double().square().sum().backward()
                    found, _ = oracle.backward(oracle.output(x, value).square().sum(), [])
                    expected = {name: before + found[name] for name, before in expected.items()}
                elif step == "penalty":
                    (value / 2 * sum(p.double().square().sum() for p in self.trained().values())).backward()
                    expected = {name: expected[name] + value * p.double() for name, p in self.trained().items()}
                else:
                    part = CLEARED[value](self.model)
                    part.zero_grad(set_to_none=step == "clear")
                    cleared = set(part.parameters())
                    for name in (name for name, p in self.trained().items() if p in cleared):
                        expected[name] = torch.zeros_like(expected[name])
        if self.gradients_follow():
            self.assert_gradients({name: gradient.detach() for name, gradient in expected.items()})
