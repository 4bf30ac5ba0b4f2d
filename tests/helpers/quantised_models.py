"""Tiny Llamas quantised by bitsandbytes, torchao and HQQ, in process: nothing is loaded."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from genft_kernels.frozen_weight import FrozenWeight
from tests.helpers.quantised_layers import gradients

TARGETS = ("q_proj", "v_proj")
IDS = torch.arange(18).reshape(2, 9)
FORMS = {"factored": {}, "tiled": {"outer_activation": "leaky_relu"}}


def tiny_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """One whose linear layers are of 128 x 128 and 128 x 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=200, use_cache=False, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def _replaced(model: nn.Module, make) -> nn.Module:
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in path:
            model.set_submodule(path, make(module))
    return model


def bitsandbytes_4bit(dtype: torch.dtype, nested: bool = True, storage: torch.dtype = torch.uint8) -> nn.Module:
    import bitsandbytes as bnb

    def make(linear):
        options = {"quant_type": "nf4", "compress_statistics": nested, "quant_storage": storage}
        layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, dtype, **options)
        layer.weight = bnb.nn.Params4bit(linear.weight.data.cpu().clone(), requires_grad=False, module=layer, **options)
        layer.bias = linear.bias
        return layer.to(torch.get_default_device())

    model = _replaced(tiny_llama(dtype), make)
    model.is_loaded_in_4bit = True  # as transformers does, for PEFT
    return model


def bitsandbytes_8bit(dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    def make(linear):
        layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, False)
        layer.weight = bnb.nn.Int8Params(linear.weight.data.cpu().clone(), requires_grad=False, has_fp16_weights=False)
        layer.bias = linear.bias
        return layer.to(torch.get_default_device())

    model = _replaced(tiny_llama(dtype), make)
    model.is_loaded_in_8bit = True
    return model


def torchao(dtype: torch.dtype, config: str) -> nn.Module:
    """By a configuration of torchao's, by name."""
    from torchao import quantization

    model = tiny_llama(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(
            model,
            getattr(quantization, config)(),
            filter_fn=lambda module, path: isinstance(module, nn.Linear) and "lm_head" not in path,
        )
    return model


def torchao_nf4(dtype: torch.dtype) -> nn.Module:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    def make(linear):
        linear.weight = nn.Parameter(to_nf4(linear.weight.data, 64, 32), requires_grad=False)
        return linear

    return _replaced(tiny_llama(dtype), make)


def hqq(dtype: torch.dtype) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    def make(linear):
        device = str(torch.get_default_device())
        return HQQLinear(linear, BaseQuantizeConfig(nbits=4, group_size=64), compute_dtype=dtype, device=device)

    with torch.no_grad():  # or biases would be results of operations, which nobody can copy
        return _replaced(tiny_llama(dtype), make)


KINDS = {
    "bitsandbytes-4bit": bitsandbytes_4bit,
    "bitsandbytes-4bit-plain-scales": lambda dtype: bitsandbytes_4bit(dtype, nested=False),
    "bitsandbytes-8bit": bitsandbytes_8bit,
    "torchao-int8": lambda dtype: torchao(dtype, "Int8WeightOnlyConfig"),
    "torchao-float8": lambda dtype: torchao(dtype, "Float8WeightOnlyConfig"),
    "torchao-intx": lambda dtype: torchao(dtype, "IntxWeightOnlyConfig"),
    "torchao-nf4": torchao_nf4,
    "hqq": hqq,
}


def with_dense_targets(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same model with plain layers over the dequantised weights in the place of the targets."""
    for path, module in list(model.named_modules()):
        if path.rpartition(".")[2] in TARGETS:
            frozen = FrozenWeight.of(module)
            assert frozen is not None
            plain = nn.Linear(*reversed(frozen.shape), bias=module.bias is not None)
            plain.weight = nn.Parameter(frozen.dense().to(dtype), requires_grad=False)
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
            model.set_submodule(path, plain)
    return model


def step(model):
    """(logits, gradients by name) of a training step."""
    torch.manual_seed(1)
    model.zero_grad()
    output = model.train()(IDS, labels=IDS)
    output.loss.backward()
    return output.logits.detach(), gradients(model)


def assert_same(model, twin):
    (logits, mine), (expected, theirs) = step(model), step(twin)
    assert (logits - expected).abs().max() == 0
    assert set(mine) == set(theirs) and mine
    assert {name for name in mine if not torch.equal(mine[name], theirs[name])} == set()
