"""Updates of stacked experts as PEFT's LoRA has them, by `target_parameters`.

PEFT wraps an experts module once for each targeted parameter, in the order in which the module has them: the last one's
tensors are `experts.lora_A` and `experts.lora_B`, those before it are within `experts.base_layer`. Experts lie side by
side along the rank, in `lora_A` [E * r, in] expert by expert, in `lora_B` [out, r * E] unit by unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..experts.layer import STACKED, update_name
from ..experts.update import ExpertUpdate
from ..matching import Names
from ..update import generate_factors


class StackedUpdate(NamedTuple):
    """The updates of one stack: dW_e = up_e down_e."""

    down: Tensor  # [E, r, in]
    up: Tensor  # [E, out, r]

    @property
    def rank(self) -> int:
        return self.down.shape[1]

    def padded(self, rank: int) -> tuple[Tensor, Tensor]:
        """`lora_A` and `lora_B`, with units of zeros up to `rank`."""
        missing = rank - self.rank
        down = nn.functional.pad(self.down, (0, 0, 0, missing))
        up = nn.functional.pad(self.up, (0, missing))
        return down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)


@torch.no_grad()
def exact_stack(path: str, update: ExpertUpdate, rank: int | None, energy: float | None) -> StackedUpdate:
    """The factored updates of all experts of a stack; ValueError where they are no LoRA of at most `rank`."""
    config = update.config
    if config.outer_activation != "identity":
        raise ValueError(
            f"{path!r}: with outer_activation={config.outer_activation!r} the updates have full rank and are no LoRA: "
            "write merged weights, by remove_genft(model, keep_update=True) and save_pretrained"
        )
    dtype = torch.promote_types(update.stored_weight.dtype, torch.float32)
    generated = generate_factors(
        update.adapted_blocks(), update.parameters_of_generator(), config, dtype=dtype, dropout=0.0, seed=None,
        backend="eager",
    )  # fmt: skip
    h, b, _ = update.layout.join_factors(generated, update.h_is_one)
    found = StackedUpdate(h.mT, config.scaling * b)
    if energy is not None or (rank is not None and rank < found.rank):
        raise ValueError(f"{path!r}: updates of stacked experts are written as they are, of rank {found.rank}")
    return found


def lora_names(stacks: Mapping[str, ExpertUpdate]) -> dict[str, str]:
    """Where PEFT has the tensors of each stack: the paths of its wrappers, by those of the updates."""
    names = {}
    for path, update in stacks.items():
        experts = path.rpartition(".")[0]
        targeted = [name for name in update.experts._parameters if f"{experts}.{update_name(name)}" in stacks]
        outside = len(targeted) - 1 - targeted.index(update.parameter_name)
        names[path] = experts + ".base_layer" * outside
    return names


def target_parameters(model: nn.Module, stacks: Iterable[str]) -> list[str]:
    """The stacks' parameters by ends of their names that mean these and no others, else by their whole names."""
    paths = {path.removesuffix(STACKED) for path in stacks}
    names = Names(name for name, _ in model.named_parameters())
    short = sorted({".".join(path.rsplit(".", 2)[-2:]) for path in paths})
    return short if names.matching(short) == paths else sorted(paths)
