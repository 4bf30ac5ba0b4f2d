"""Tiny models with GenFT adapters of PEFT's, beside the same ones with this package's own."""

from __future__ import annotations

import copy

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from genft_kernels import GenFTConfig, apply_genft
from genft_kernels.files import names
from genft_kernels.files.peft_file import RENAMED
from genft_kernels.integrations.peft import PeftGenFTConfig
from genft_kernels.integrations.peft.layer import GenFTLayer
from tests.helpers.tiny_models import VOCABULARY, Encoder, randomise

SMALL = {"shared_dim": 2, "specific_dim": 1, "inner_activation": "tanh"}


class TransposedEncoder(nn.Module):
    """Weights stored as [in, out], fused and not."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.c_attn, self.c_proj = Conv1D(3 * dim, dim), Conv1D(dim, dim)

    def forward(self, tokens):
        query, key, value = self.c_attn(self.embedding(tokens)).chunk(3, -1)
        return self.c_proj(nn.functional.scaled_dot_product_attention(query, key, value))


def base(make=Encoder, dtype=torch.float64) -> nn.Module:
    """The same model for each call."""
    torch.manual_seed(7)
    return make().to(dtype).eval()


def peft_config(**settings) -> PeftGenFTConfig:
    given = {"target_modules": ["query", "value"], **SMALL, **settings}
    return PeftGenFTConfig(**{RENAMED.get(name, name): value for name, value in given.items()})


def peft_model(make=Encoder, dtype=torch.float64, **settings) -> PeftModel:
    """A model with a random adapter, "default"."""
    return randomised(get_peft_model(base(make, dtype), peft_config(**settings)).eval())


def randomised(model: nn.Module, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(model)


def own_model(model: PeftModel, make=Encoder, dtype=torch.float64, **settings) -> nn.Module:
    """The model of `peft_model` by `apply_genft`."""
    given = {"target_modules": ["query", "value"], **SMALL, **settings}
    own = apply_genft(base(make, dtype), GenFTConfig(**given))
    values = own_names(dict(model.named_parameters()))
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[name])
    return own.eval()


def own_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a PeftModel, or what belongs to them, by the names that `apply_genft` gives."""
    stripped = {name.replace(".modules_to_save.default", "").replace(".default", ""): t for name, t in tensors.items()}
    found = {names.in_model(name): tensor for name, tensor in stripped.items()}
    return {name.removeprefix(names.MODULES_TO_SAVE): tensor for name, tensor in found.items()}


def updates(model: PeftModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    """dW [out, in] of each layer that has the adapter."""
    layers = ((name, getattr(module, "genft_own", {})) for name, module in model.named_modules())
    return {name: own[adapter].delta_weight() for name, own in layers if adapter in own}


def layers_of(model: nn.Module) -> list[GenFTLayer]:
    return [module for module in model.modules() if isinstance(module, GenFTLayer)]


def group_of(model: PeftModel, shape=(8, 8), adapter: str = "default"):
    generators = [layer.genft_own[adapter].generator for layer in layers_of(model) if adapter in layer.genft_own]
    return next(each.group for each in generators if (each.in_features, each.out_features) == shape)


def with_second_adapter(model: PeftModel, **settings) -> PeftModel:
    """Another random adapter, "other"."""
    model.add_adapter("other", peft_config(**settings))
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other" in name:
                parameter.normal_(std=0.3)
    return model


def folded(model: PeftModel, *adapters: str) -> nn.Module:
    """A plain copy of the model whose weights are W with the adapters' updates."""
    merged = copy.deepcopy(model)
    merged.merge_adapter(list(adapters))
    return merged
