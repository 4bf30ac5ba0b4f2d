"""Choices of the stateful fuzz (settings, optimizers, changes, failures midway), and how it judges a model."""

from __future__ import annotations

import contextlib

import hypothesis.strategies as st
import torch
from hypothesis.stateful import RuleBasedStateMachine
from torch import nn

from genft_kernels import GenFTConfig
from genft_kernels.activations import ACTIVATIONS
from tests.helpers.oracle import WIDTH

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
            self.assert_close(parameter.grad, expected[name], f"gradient of {name}", autocast, scale)

    def step(self, name):
        """A step of an optimizer by name: the one at hand if it is the same."""
        if self.dtype == torch.float16:
            name = "SGD"  # Adam's epsilon is zero there
        if self.optimizer is None or self.optimizer[0] != name:
            self.optimizer = name, OPTIMIZERS[name](self.trained().values())
        nn.utils.clip_grad_norm_(self.trained().values(), 1.0)
        self.optimizer[1].step()
