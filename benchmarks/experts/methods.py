"""The block, and what adapts its experts."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.step.methods import trained
from genft_kernels import GenFTConfig, apply_genft

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A block of Mixtral, and the tokens of a call."""

    hidden: int = 512
    inner: int = 1024
    experts: int = 16
    chosen: int = 2
    tokens: int = 1024


class Block(nn.Module):
    """A router and its experts; each token goes to `chosen` of them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, implementation: str) -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        super().__init__()
        config = MixtralConfig(
            hidden_size=shape.hidden, intermediate_size=shape.inner, num_local_experts=shape.experts,
            num_experts_per_tok=shape.chosen,
        )  # fmt: skip
        config._experts_implementation = implementation
        self.mlp = MixtralSparseMoeBlock(config).to(dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Of hidden states [1, T, d]."""
        return self.mlp(x)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to adapt the block's experts, k units each."""

    name: str
    adapt: Callable[[nn.Module, int], nn.Module]
    implementation: str = "grouped_mm"  # of transformers, as it chooses by itself where that runs

    def build(self, shape: Shape, dtype: torch.dtype, k: int) -> nn.Module:
        """The adapted block in training mode, with an update that is not zero."""
        model = self.adapt(Block(shape, dtype, self.implementation), k).train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trained(model).values():
                parameter.normal_(std=0.02, generator=generator)
        return model


def _genft(preset: str = "fast", **settings) -> Callable[[nn.Module, int], nn.Module]:
    def adapt(block: nn.Module, k: int) -> nn.Module:
        sizes = {"shared_dim": k // 2, "specific_dim": k - k // 2}
        return apply_genft(block, GenFTConfig.preset(preset, **sizes, **settings, target_parameters=TARGETS))

    return adapt


def _lora(block: nn.Module, k: int) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=k, lora_alpha=k, target_modules=[], target_parameters=TARGETS)
    return inject_adapter_in_model(config, block)


METHODS = [
    Method("frozen", lambda block, k: block),
    Method("genft-fast", _genft()),
    Method("genft-fast-layer", _genft(expert_specific="layer")),
    Method("genft-fast-both", _genft("fast-both")),
    Method("genft-tiled", _genft("fast-both", outer_activation="leaky_relu")),
    Method("lora-grouped", _lora),
    Method("lora-eager", _lora, implementation="eager"),
]
