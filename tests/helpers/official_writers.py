"""For the tests: files as the official GenFT code writes them, and its forward said again.

Both are written from the description of the official code and use nothing of genft_kernels, so that what they agree
on with the package is the official behaviour, not the package's opinion of it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

BASE = "base_model.model."
D, S, R = 16, 4, 2  # width, shared and specific units


class Encoder(nn.Module):
    """A base model with a text encoder's names: query and value of two layers, a classification head."""

    def __init__(self, d: int = 16, classes: int = 3):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(_EncoderLayer(d) for _ in range(2))
        self.classifier = nn.Sequential()
        self.classifier.add_module("dense", nn.Linear(d, d))
        self.classifier.add_module("out_proj", nn.Linear(d, classes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder.layer:
            x = x + layer(x)
        return self.classifier(x[:, 0])

    targets = tuple(f"encoder.layer.{n}.attention.{name}" for n in range(2) for name in ("query", "value"))


class _EncoderLayer(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(d, d) for name in ("query", "key", "value")})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.attention[name](x) for name in ("query", "key", "value"))
        return torch.softmax(q @ k.mT / math.sqrt(x.shape[-1]), -1) @ v


class ViT(nn.Module):
    """A base model with timm's names for what the ViT variant touches: `blocks.N.attn.qkv` and `head`."""

    def __init__(self, d: int = 16, depth: int = 3, classes: int = 5):
        super().__init__()
        self.blocks = nn.Sequential(*(_ViTBlock(d) for _ in range(depth)))
        self.head = nn.Linear(d, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)[:, 0])


class _ViTBlock(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(d)
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(d, 3 * d)
        self.attn.proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.qkv(self.norm1(x)).chunk(3, -1)
        return x + self.attn.proj(torch.softmax(q @ k.mT / math.sqrt(x.shape[-1]), -1) @ v)


# --- what a training run leaves -----------------------------------------------------------------------------------


def generator_tensors(d: int, s: int, r: int, bias: bool) -> dict[str, Tensor]:
    """The shared tensors, below the generator; random and of a size at which no activation is linear."""
    tensors = {}
    for stage in (1, 2):
        tensors[f"genft_share_{stage}_a.linear.weight"] = torch.randn(s, d)
        tensors[f"genft_share_{stage}_b.linear.weight"] = torch.randn(d, s) / 2
        if bias:
            tensors[f"genft_share_{stage}_a.linear.bias"] = torch.randn(s + r) / 4
            tensors[f"genft_share_{stage}_b.linear.bias"] = torch.randn(d) / 4
    return tensors


def individual_tensors(d: int, r: int) -> dict[str, Tensor]:
    """One layer's own tensors; none where r = 0."""
    if r == 0:
        return {}
    return {"genft_individual_weight_a": torch.randn(r, d), "genft_individual_weight_b": torch.randn(d, r) / 2}


def peft_checkpoint(
    targets: tuple[str, ...],
    d: int,
    s: int,
    r: int,
    *,
    bias: bool = True,
    head: dict[str, Tensor] | None = None,
    **config,
) -> tuple[dict[str, Tensor], dict]:
    """(tensors, settings) of the PEFT variant; `head` is by path in the base model, `config` overrides settings."""
    generator = generator_tensors(d, s, r, bias)
    tensors = {f"base_model.generator.{key}": value for key, value in generator.items()}
    for target in targets:
        tensors |= {f"{BASE}{target}.{key}": value for key, value in individual_tensors(d, r).items()}
        tensors |= {f"{BASE}{target}.generator.{key}": value.clone() for key, value in generator.items()}
    tensors |= {BASE + key: value.clone() for key, value in (head or {}).items()}
    settings = {
        "auto_mapping": None, "base_model_name_or_path": "base", "bias": "none", "drop": 0.1, "exclude_modules": None,
        "fan_in_fan_out": False, "generator_share_dim": s, "individual_features": r, "inference_mode": True,
        "individual_init_a": "kaiming_uniform", "individual_init_b": "kaiming_uniform", "inner_activation": "None",
        "layers_pattern": None, "layers_to_transform": None, "modules_to_save": ["classifier", "score"],
        "outer_activation": "None", "peft_type": "GENFT", "ratio_W0": 0.5, "revision": None, "scaling": 0.05,
        "target_modules": ["value", "query"], "task_type": "SEQ_CLS",
    }  # fmt: skip
    return tensors, settings | config


def write_peft(directory: Path, tensors: dict[str, Tensor], settings: dict) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True))
    return directory


def vit_checkpoint(
    depth: int, d: int, s: int, r: int, *, bias: bool = False, classes: int = 5, **config
) -> tuple[dict[str, Tensor], dict]:
    """(tensors, settings) of the ViT variant; `config` overrides settings."""
    tensors = {}
    for n in range(depth):
        tensors |= {f"blocks.{n}.attn.{key}": value for key, value in individual_tensors(d, r).items()}
        if n == 0:
            generator = generator_tensors(d, s, r, bias)
            tensors |= {f"blocks.0.attn.gen.{key}": value for key, value in generator.items()}
    tensors |= {"head.weight": torch.randn(classes, d), "head.bias": torch.randn(classes)}
    settings = {
        "batch_size": 64, "benchmark": "vtab", "bias": bias, "class_num": classes, "dataset": "cifar", "dpr": 0.1,
        "generator_share_dim": s, "individual_features": r, "individual_init_a": "zero",
        "individual_init_b": "kaiming_uniform", "inner_activation": "None", "lr": 0.001,
        "model": "vit_base_patch16_224_in21k_genft", "outer_activation": "leakyrelu", "ratio_W0": 1.4, "scaling": 1.0,
    }  # fmt: skip
    return tensors, settings | config


def write_vit(directory: Path, tensors: dict[str, Tensor], settings: dict, *, epoch_key: str = "epoch") -> Path:
    import yaml

    directory.mkdir(parents=True, exist_ok=True)
    torch.save({epoch_key: 7, "model": tensors, "best_acc": 0.5}, directory / "best_model.pt")
    (directory / "args.yaml").write_text(yaml.safe_dump(settings, sort_keys=True))
    return directory


# --- the official forward, in evaluation ---------------------------------------------------------------------------


def peft_forward(
    model: nn.Module, x: Tensor, tensors: dict[str, Tensor], settings: dict, targets: tuple[str, ...]
) -> Tensor:
    """The answer of the official PEFT tuner: `model(x) + F.linear(x, D)` in every target, the trained head in place.

    `model` is the untouched base; its head is replaced by the trained one.
    """
    tensors = {key: value.to(x.dtype) for key, value in tensors.items()}
    head = {key[len(BASE) :]: value for key, value in tensors.items() if key.startswith(BASE) and "genft_" not in key}
    model.load_state_dict(head, strict=False)
    generator = _below(tensors, "base_model.generator.")
    hooks = []
    for target in targets:
        layer = model.get_submodule(target)
        own = _below(tensors, f"{BASE}{target}.genft_individual_weight_")
        rho = settings["ratio_W0"] if settings["individual_features"] > 0 else 1.0
        update = settings["scaling"] * _generate(rho * layer.weight, generator, own, settings, matrix_ratio=1.0)
        hooks.append(layer.register_forward_hook(lambda _, args, y, update=update: y + args[0] @ update.T))
    try:
        return model(x)
    finally:
        for hook in hooks:
            hook.remove()


def vit_forward(model: ViT, x: Tensor, tensors: dict[str, Tensor], settings: dict) -> Tensor:
    """The answer of the official ViT: `x @ D` onto q and v of every block's qkv, one individual pair for both."""
    tensors = {key: value.to(x.dtype) for key, value in tensors.items()}
    model.head.load_state_dict(_below(tensors, "head."))
    generator = _below(tensors, "blocks.0.attn.gen.")
    hooks = []
    for n, block in enumerate(model.blocks):
        d = x.shape[-1]
        own = _below(tensors, f"blocks.{n}.attn.genft_individual_weight_")
        updates = [
            settings["scaling"] * _generate(weight, generator, own, settings, matrix_ratio=settings["ratio_W0"])
            for weight in (block.attn.qkv.weight[:d], block.attn.qkv.weight[-d:])
        ]

        def add(_, args, y, updates=updates, d=d):
            y = y.clone()
            y[..., :d] += args[0] @ updates[0]
            y[..., -d:] += args[0] @ updates[1]
            return y

        hooks.append(block.attn.qkv.register_forward_hook(add))
    try:
        return model(x)
    finally:
        for hook in hooks:
            hook.remove()


def _generate(weight: Tensor, generator: dict, own: dict, settings: dict, *, matrix_ratio: float) -> Tensor:
    inner, outer = (_official_activation(settings[f"{name}_activation"]) for name in ("inner", "outer"))

    def linear(value: Tensor, name: str, matrix: Tensor | None, dim: int) -> Tensor:
        full = generator[f"{name}.linear.weight"]
        full = full if matrix is None else torch.cat([full, matrix], dim)
        product = value @ (matrix_ratio * full).T
        return product + generator[f"{name}.linear.bias"] if f"{name}.linear.bias" in generator else product

    value = weight
    for stage in (1, 2):
        value = value if stage == 1 else value.T
        value = inner(linear(value, f"genft_share_{stage}_a", own.get("a"), 0))
        value = outer(linear(value, f"genft_share_{stage}_b", own.get("b"), 1))
    return value


def _official_activation(name: str | None):
    return {
        "relu": lambda z: z.clamp(min=0),
        "leakyrelu": lambda z: torch.where(z > 0, z, 0.01 * z),
        "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
        "tanh": torch.tanh,
    }.get(str(name).lower(), lambda z: z)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
