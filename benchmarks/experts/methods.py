"""The block, and what adapts its experts, each with the plain weights that it stands for."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.step.methods import trained
from genft_kernels import GenFTConfig, apply_genft, reference
from genft_kernels.adapted_model import adapted_layers
from genft_kernels.parameters import of_block

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
    """A way to adapt the block's experts, k units each.

    Args:
        name: unique among `METHODS`.
        adapt: gives a block what trains.
        weights: by name, the stacks with which the block's own experts compute the same, made of what trains.
        implementation: of transformers' experts; by default what it chooses by itself where that runs.
    """

    name: str
    adapt: Callable[[nn.Module, int], nn.Module]
    weights: Callable[[nn.Module], dict[str, Tensor]]
    implementation: str = "grouped_mm"

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


def _genft_weights(block: nn.Module) -> dict[str, Tensor]:
    """W + dW by the specification, to which every expert, and gate and up of it, is a matrix of its own."""
    found = {}
    for update in adapted_layers(block).values():
        stored, params = update.stored_weight, update.parameters_of_generator()
        halves = 2 if update.parameter_name == "gate_up_proj" else 1
        deltas = [
            reference.delta_weight(matrix, of_block(params, at), update.config)
            for at, matrix in enumerate(stored.unflatten(1, (halves, -1)).flatten(0, 1))
        ]
        found[update.parameter_name] = stored + torch.stack(deltas).view_as(stored)
    return found


def _lora(block: nn.Module, k: int) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=k, lora_alpha=k, target_modules=[], target_parameters=TARGETS)
    return inject_adapter_in_model(config, block)


def _lora_weights(block: nn.Module) -> dict[str, Tensor]:
    """W + B A, as PEFT merges them."""
    from peft.tuners.lora.layer import ParamWrapper

    wrappers = [module for module in block.modules() if isinstance(module, ParamWrapper)]
    return {each.parameter_name: each.get_param() + each.get_delta_weight("default") for each in wrappers}


METHODS = [
    Method("frozen", lambda block, k: block, lambda block: dict(block.mlp.experts.named_parameters())),
    Method("genft-fast", _genft(), _genft_weights),
    Method("genft-fast-layer", _genft(expert_specific="layer"), _genft_weights),
    Method("genft-fast-both", _genft("fast-both"), _genft_weights),
    Method("genft-tiled", _genft("fast-both", outer_activation="leaky_relu"), _genft_weights),
    Method("lora-grouped", _lora, _lora_weights),
    Method("lora-eager", _lora, _lora_weights, implementation="eager"),
]
