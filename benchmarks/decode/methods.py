"""Models that decode: the base model, and the same with an adapter, unmerged and merged."""

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.step.methods import METHODS, Method, lora, trained
from benchmarks.step.models import ALL_LINEAR, Q_AND_V
from genft_kernels import merge

GENFT = METHODS["genft-fast"]
LORA = lora(GENFT.k)
# The last names of the layers that are adapted.
TARGETS = {"q and v": Q_AND_V, "all linear": ALL_LINEAR}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model that decodes, in evaluation mode.

    Args:
        name: unique among those of a case.
        model: shares the base model's frozen weights.
        plain_weights: by name, the weights with which the base model computes the same.
        k: hidden units of an adapted layer; None for the base.
        trained: how many parameters its adapter has.
    """

    name: str
    model: nn.Module
    plain_weights: Callable[[], dict[str, Tensor]]
    k: int | None = None
    trained: int = 0


def decoders(base: nn.Module, targets: tuple[str, ...]) -> list[Decoder]:
    """The base, GenFT unmerged and merged, LoRA of the same k and LoRA of as many parameters; all share W."""
    base.targets = targets
    genft = _adapted(GENFT, base, "genft")
    merged = dataclasses.replace(genft, name="genft-merged", model=merge(_twin(genft.model)))
    of_equal_k = _adapted(LORA, base, "lora")
    rank = max(1, round(genft.trained / of_equal_k.trained * LORA.k))
    return [
        Decoder("base", base, lambda: {}),
        genft,
        merged,
        of_equal_k,
        _adapted(lora(rank), base, "lora-of-equal-size"),
    ]


def _adapted(method: Method, base: nn.Module, name: str) -> Decoder:
    model = method.build(base).eval()
    size = sum(parameter.numel() for parameter in trained(model).values())
    return Decoder(name, model, lambda: method.plain_weights(model), method.k, size)


@torch.no_grad()
def _twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
