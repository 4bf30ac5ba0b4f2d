"""The whole models whose training steps are measured: known sizes, random weights, nothing downloaded."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

# q and v of an attention, as the models of transformers call them.
Q_AND_V = ("query", "value", "q_proj", "v_proj")
# Every linear layer of a LLaMA.
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SEED = 11
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
SMALL |= {"initializer_range": 0.1}  # weights of the size that a wide model's products have


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model by its transformers configuration.

    Args:
        config_class: its name in transformers.
        sizes: fields of the configuration; dropout of the backbone is off everywhere, so that a gate can compare.
        tiny: the fields that, with `SMALL`, make it small enough for the gate.
        sequence: tokens of one sequence in its cases.
        targets: the last names of the layers that are adapted.
    """

    name: str
    config_class: str
    sizes: dict[str, Any]
    tiny: dict[str, Any]
    sequence: int = 128
    targets: tuple[str, ...] = Q_AND_V

    def build(self, device: torch.device, dtype: torch.dtype, tiny: bool = False) -> nn.Module:
        """The model with random weights, in training mode, the same ones every time; `targets` is an attribute."""
        import transformers

        sizes = self.sizes | (SMALL | self.tiny if tiny else {})
        options = {} if self.config_class == "LlamaConfig" else {"add_pooling_layer": False}
        torch.manual_seed(SEED)
        with device:
            model = transformers.AutoModel.from_config(getattr(transformers, self.config_class)(**sizes), **options)
        model.targets = self.targets
        return model.to(dtype).train()

    def inputs(self, model: nn.Module, batch: int, sequence: int, seed: int) -> dict[str, Tensor]:
        """One micro-batch of random tokens or images for a model that `build` made."""
        parameter, config = next(model.parameters()), model.config
        options = {"generator": torch.Generator(parameter.device).manual_seed(seed), "device": parameter.device}
        if self.config_class == "ViTConfig":
            shape = (batch, config.num_channels, config.image_size, config.image_size)
            return {"pixel_values": torch.randn(shape, **options).to(parameter.dtype)}
        return {"input_ids": torch.randint(config.vocab_size, (batch, sequence), **options)}


def _llama(name: str, targets: tuple[str, ...] = Q_AND_V, **sizes: int) -> Model:
    """Four layers, which is what fits; the step of a whole one is proportionally longer."""
    settings = {"num_hidden_layers": 4, "vocab_size": 32000, "use_cache": False} | sizes
    return Model(name, "LlamaConfig", settings, {"num_key_value_heads": 2, "vocab_size": 50}, targets=targets)


_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
_ROBERTA |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ALL = (
    Model("roberta-base", "RobertaConfig", _ROBERTA, {"vocab_size": 50}),
    Model("vit-b16", "ViTConfig", {}, {"image_size": 32}, 197),
    _llama("llama-7b-4-layers", hidden_size=4096, intermediate_size=11008, num_attention_heads=32),
    _llama("llama-narrow-4-layers", hidden_size=1024, intermediate_size=2752, num_attention_heads=16),
    _llama(
        "smollm2-4-layers-all-linear", ALL_LINEAR, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
        num_key_value_heads=3,
    ),
)  # fmt: skip
MODELS = {model.name: model for model in _ALL}


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
        """The keys that tell a result row from others, beside the method."""
        fields = "model", "batch", "sequence", "accumulation", "dtype"
        return dict(zip(fields, (self.model.name, *dataclasses.astuple(self)[1:]), strict=True))

    def __str__(self) -> str:
        micro_batches = f", {self.accumulation} micro-batches" if self.accumulation > 1 else ""
        return f"{self.model.name}, {self.batch} x {self.sequence} tokens{micro_batches}, {self.dtype_name}"


def default_cases(device: torch.device) -> list[StepCase]:
    """Minutes' worth on two CPU cores; the sizes that models are trained at on a GPU."""
    if device.type == "cuda":
        names = "roberta-base", "vit-b16", "llama-7b-4-layers"
        sizes = [(name, 64, count, "bfloat16") for count in (1, 8) for name in names]
    else:
        sizes = [("roberta-base", 32, 1, "float32"), ("roberta-base", 32, 1, "bfloat16")]
        sizes += [("roberta-base", 1, count, "float32") for count in (1, 8)]
        sizes += [("vit-b16", 2, 1, "float32"), ("llama-narrow-4-layers", 4, 1, "float32")]
    cases = [StepCase(MODELS[name], batch, MODELS[name].sequence, *rest) for name, batch, *rest in sizes]
    if device.type == "cpu":
        everywhere = MODELS["smollm2-4-layers-all-linear"]
        cases += [StepCase(everywhere, *size, 1, "float32") for size in ((1, 96), (4, 128), (32, 128))]
    return cases


def output_grad(output: Tensor, seed: int) -> Tensor:
    """Random, of the size of a mean over the tokens."""
    generator = torch.Generator(output.device).manual_seed(seed)
    grad = torch.randn(output.shape, generator=generator, device=output.device)
    return grad.div_(output[..., 0].numel()).to(output.dtype)
