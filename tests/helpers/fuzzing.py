"""What the stateful fuzz draws from: settings, optimizers, ways to change a tensor, and failures midway."""

from __future__ import annotations

import contextlib

import hypothesis.strategies as st
import torch
from torch import nn

from genft_kernels import GenFTConfig
from genft_kernels.activations import ACTIVATIONS

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
    transform = draw(st.sampled_from(["both", "both", "column", "row"]))
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
