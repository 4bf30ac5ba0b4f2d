"""The README's Python blocks run as they are printed, one after the other, and what it counts is so."""

import re
import sys
import types
from pathlib import Path

import torch
import transformers
from torch import nn

from genft_kernels import GenFTConfig, GenFTLinear, apply_genft, trainable_summary
from tests.helpers.tiny_models import Encoder, FusedEncoder, GroupedQueryBlock

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def small_model(name, num_labels):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    return transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(num_labels=num_labels, pad_token_id=0, **sizes)
    )


def vision_transformer(name, pretrained, num_classes):
    model = FusedEncoder(32)
    model.head = nn.Linear(32, num_classes)
    return model


def test_the_python_blocks_run(monkeypatch, tmp_path):
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", small_model)
    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=vision_transformer))
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)
    monkeypatch.chdir(tmp_path)
    text, vision = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (gpu,) = re.findall(r'`(apply_genft\(model\.to\("cuda"\).*?)`', README)
    names = {}
    exec(text, names)
    batch = torch.randint(3, 50, (2, 6))
    assert torch.equal(names["model"].eval()(batch).logits, names["fresh"].eval()(batch).logits)  # nothing is trained
    exec(vision, names)
    assert names["model"].qkv.blocks == (3, (0, 2)) and names["model"].head.weight.requires_grad
    names |= dict(model=FusedEncoder(), config=GenFTConfig(shared_dim=2, target_modules=["proj"]))
    exec(gpu, names)
    assert names["model"].proj.backend == "triton"


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


def test_the_parameter_counts_are_those_of_the_formula():
    config = GenFTConfig(shared_dim=2, specific_dim=1)
    square = trainable_summary(apply_genft(Encoder(layers=2, dim=8), config))
    assert (square["generators"], square["specific"]) == (2 * 2 * 16, 4 * 1 * 16)
    both = trainable_summary(apply_genft(GroupedQueryBlock(), config))  # q 8 x 8, v 8 x 4
    assert (both["generators"], both["specific"]) == (2 * 2 * (16 + 12), 16 + 2 * 12)
    for transform, width in (("column", 8), ("row", 4)):
        layer = GenFTLinear(8, 4, config=GenFTConfig(shared_dim=2, specific_dim=1, transform=transform))
        assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 2 * (2 + 1) * width


def test_the_readme_counts_the_parameters_of_roberta_base():
    width, layers, s, r = 768, 24, 12, 7  # q and v of 12 blocks
    model = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
    config = GenFTConfig.preset("fast", target_modules="[0-9]+")
    ours = trainable_summary(apply_genft(model, config))["trainable"]
    lora = layers * (s + r) * 2 * width
    assert f"k = {s + r}: {ours:,}, where LoRA of rank {s + r} has\n{lora:,}" in README
