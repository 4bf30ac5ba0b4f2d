"""The whole models whose training steps are measured: known sizes, random weights, nothing downloaded."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

# q and v of an attention, as the models of transformers call them.
TARGETS = ["query", "value", "q_proj", "v_proj"]
SEED = 11
_VOCABULARY = 50


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model by its transformers configuration.

    Args:
        config_class: its name in transformers.
        sizes: fields of the configuration; dropout of the backbone is off everywhere, so that a gate can compare.
        tiny: the fields that make it small enough for the gate.
        options: of the model's constructor.
        sequence: tokens of one sequence in its cases.
        fixed_sequence: whether it has no choice, as a ViT.
    """

    name: str
    config_class: str
    sizes: dict[str, Any]
    tiny: dict[str, Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    sequence: int = 128
    fixed_sequence: bool = False

    def build(self, device: torch.device, dtype: torch.dtype, tiny: bool = False) -> nn.Module:
        """The model with random weights, in training mode; the same ones every time."""
        import transformers

        config = getattr(transformers, self.config_class)(**self.sizes | (self.tiny if tiny else {}))
        torch.manual_seed(SEED)
        with device:
            model = transformers.AutoModel.from_config(config, **self.options)
        return model.to(dtype).train()

    def inputs(self, model: nn.Module, batch: int, sequence: int, seed: int) -> dict[str, Tensor]:
        """One micro-batch of random tokens or images for a model that `build` made."""
        parameter, config = next(model.parameters()), model.config
        generator = torch.Generator(parameter.device).manual_seed(seed)
        options = {"generator": generator, "device": parameter.device}
        if self.config_class == "ViTConfig":
            shape = (batch, config.num_channels, config.image_size, config.image_size)
            return {"pixel_values": torch.randn(shape, **options).to(parameter.dtype)}
        return {"input_ids": torch.randint(config.vocab_size, (batch, sequence), **options)}


_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
_SMALL |= {"initializer_range": 0.1}  # weights of the size that a wide model's products have
_NO_POOLER: dict[str, Any] = {"add_pooling_layer": False}


def _llama(name: str, **sizes: int) -> Model:
    """Four layers, which is what fits; the step of a whole one is proportionally longer."""
    settings = {"num_hidden_layers": 4, "vocab_size": 32000, "use_cache": False} | sizes
    return Model(name, "LlamaConfig", settings, _SMALL | {"num_key_value_heads": 2, "vocab_size": _VOCABULARY})


MODELS = {
    model.name: model
    for model in (
        Model(
            "roberta-base", "RobertaConfig",
            {
                "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
                "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            },
            _SMALL | {"vocab_size": _VOCABULARY}, _NO_POOLER,
        ),
        Model("vit-b16", "ViTConfig", {}, _SMALL | {"image_size": 32}, _NO_POOLER, 197, True),
        _llama("llama-7b-4-layers", hidden_size=4096, intermediate_size=11008, num_attention_heads=32),
        _llama("llama-narrow-4-layers", hidden_size=1024, intermediate_size=2752, num_attention_heads=16),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StepCase:
    """One optimizer step: `accumulation` micro-batches of `batch` sequences."""

    model: Model
    batch: int
    sequence: int
    accumulation: int
    dtype_name: str

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.batch * self.sequence

    @property
    def key(self) -> dict[str, str | int]:
        """What a result row is told apart by, beside the method."""
        return {
            "model": self.model.name, "batch": self.batch, "sequence": self.sequence,
            "accumulation": self.accumulation, "dtype": self.dtype_name,
        }  # fmt: skip

    def __str__(self) -> str:
        micro_batches = f", {self.accumulation} micro-batches" if self.accumulation > 1 else ""
        return f"{self.model.name}, {self.batch} x {self.sequence} tokens{micro_batches}, {self.dtype_name}"


def default_cases(device: torch.device) -> list[StepCase]:
    """Minutes' worth on two CPU cores; the sizes that models are trained at on a GPU."""
    if device.type == "cuda":
        sizes = [("roberta-base", 64), ("vit-b16", 64), ("llama-7b-4-layers", 64)]
        return [_case(name, batch, count, "bfloat16") for count in (1, 8) for name, batch in sizes]
    return [
        _case("roberta-base", 32, 1, "float32"),
        _case("roberta-base", 32, 1, "bfloat16"),
        _case("roberta-base", 1, 1, "float32"),
        _case("roberta-base", 1, 8, "float32"),
        _case("vit-b16", 2, 1, "float32"),
        _case("llama-narrow-4-layers", 4, 1, "float32"),
    ]


def _case(name: str, batch: int, accumulation: int, dtype_name: str) -> StepCase:
    return StepCase(MODELS[name], batch, MODELS[name].sequence, accumulation, dtype_name)


def output_grad(output: Tensor, seed: int) -> Tensor:
    """Random, of the size of a mean over the tokens."""
    generator = torch.Generator(output.device).manual_seed(seed)
    grad = torch.randn(output.shape, generator=generator, device=output.device)
    return grad.div_(output[..., 0].numel()).to(output.dtype)
