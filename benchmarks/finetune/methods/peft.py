"""The methods that come with PEFT, on the same linears."""

from typing import Any

from torch import nn

from ..tasks.problem import Places, Problem
from .method import Method

MOST_VERA_UNITS = 1024  # its vectors are short: a budget would pay for more than are of use


def lora(model: nn.Module, problem: Problem, size: int, scale: float) -> nn.Module:
    """LoRA of the rank whose size is nearest to the budget, alpha twice the rank times `scale`."""
    from peft import LoraConfig

    rank = nearest_rank(model, problem.places, size)
    return _peft(model, problem.places, LoraConfig, r=rank, lora_alpha=2 * rank * scale, lora_dropout=0.0)


def vera(model: nn.Module, problem: Problem, size: int, scale: float) -> nn.Module:
    """VeRA: one vector of the rank and one of the output's length for each linear."""
    from peft import VeraConfig

    layers = problem.places.linears(model)
    rank = round(size / len(layers)) - max(layer.out_features for layer in layers)
    return _peft(model, problem.places, VeraConfig, r=min(max(1, rank), MOST_VERA_UNITS), d_initial=0.1 * scale)


def fourierft(model: nn.Module, problem: Problem, size: int, scale: float) -> nn.Module:
    """FourierFT: the same number of frequencies for each linear."""
    from peft import FourierFTConfig

    layers = problem.places.linears(model)
    most = min(layer.weight.numel() for layer in layers)
    return _peft(
        model, problem.places, FourierFTConfig, n_frequency=min(size // len(layers), most), scaling=150.0 * scale
    )


def nearest_rank(model: nn.Module, places: Places, size: int) -> int:
    """The LoRA rank that comes nearest to `size` parameters."""
    a_rank = sum(module.in_features + module.out_features for module in places.linears(model))
    return max(1, round(size / a_rank))


def _peft(model: nn.Module, places: Places, config: Any, **settings: Any) -> nn.Module:
    from peft import get_peft_model

    return get_peft_model(model, config(**settings, **places.of_config()))


LORA = Method("PEFT LoRA", lora)
VERA = Method("PEFT VeRA", vera, rates=(5e-3, 1e-2, 2e-2))
FOURIERFT = Method("PEFT FourierFT", fourierft, rates=(1e-2, 2e-2, 4e-2))
