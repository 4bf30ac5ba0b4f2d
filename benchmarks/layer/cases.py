"""Cases to measure: layers of known models x tokens x dtype x k x form (docs/method.md#what-it-costs)."""

import dataclasses
import itertools
from collections.abc import Iterator

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A pass of a layer that is timed by itself. "both" is a forward and the backward after it.
DIRECTIONS = ("forward", "backward", "both")
# What forces a form. The inner activation and rho are those of the preset "fast-both": they cost k columns only.
FORMS = {"factored": {}, "tiled": {"outer_activation": "leaky_relu"}, "dropout": {"dropout": 0.1}}
# k = s + r as the presets split it: llama, glue, vtab, and one above them.
SPLITS = {8: (4, 4), 26: (24, 2), 37: (32, 5), 64: (56, 8)}


@dataclasses.dataclass(frozen=True)
class Layer:
    """Linear layers of one shape in a model; `count` of them are adapted and share one generator."""

    name: str
    in_features: int
    out_features: int
    count: int


_ALL = (
    Layer("roberta-base-qv", 768, 768, 24),
    Layer("vit-b16-qv", 768, 768, 24),
    Layer("roberta-large-qv", 1024, 1024, 48),
    Layer("llama-7b-qv", 4096, 4096, 64),
    Layer("llama3-8b-v", 4096, 1024, 32),  # grouped-query attention: fewer value heads than query heads
    Layer("llama-7b-mlp", 4096, 11008, 64),  # gate and up
)
LAYERS = {layer.name: layer for layer in _ALL}


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer at one size. Every layer is without bias: it costs each provider the same addition."""

    layer: Layer
    tokens: int
    dtype_name: str
    k: int
    form: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def split(self) -> tuple[int, int]:
        """(shared, specific) units."""
        return SPLITS[self.k]

    @property
    def config(self) -> dict[str, str | int | float | bool]:
        """GenFT's settings, but for the scaling."""
        shared, specific = self.split
        return {
            "shared_dim": shared, "specific_dim": specific, "inner_activation": "tanh", "weight_ratio": 16.0,
            "zero_delta": False, **FORMS[self.form],
        }  # fmt: skip

    @property
    def rank_of_equal_parameters(self) -> int:
        """The LoRA rank that trains as many parameters over all `count` layers as GenFT does, at least 1.

        GenFT: 2 s (in + out) shared, and r (in + out) a layer where the specific units are tied (square), else twice
        that. LoRA of rank q: q (in + out) a layer.
        """
        shared, specific = self.split
        tied = self.layer.in_features == self.layer.out_features
        return max(1, round(specific * (1 if tied else 2) + 2 * shared / self.layer.count))

    @property
    def key(self) -> dict[str, str | int]:
        """The keys that tell a result row from others, beside provider and direction."""
        layer = self.layer
        return {
            "layer": layer.name, "in": layer.in_features, "out": layer.out_features, "tokens": self.tokens,
            "dtype": self.dtype_name, "k": self.k, "form": self.form,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.layer.name}-T{self.tokens}-{self.dtype_name}-k{self.k}-{self.form}"


def cpu_cases() -> list[Case]:
    """The cases that two CPU cores do within minutes: encoder sizes in every form, a rectangular v, a decode step."""
    roberta, vit, gqa = LAYERS["roberta-base-qv"], LAYERS["vit-b16-qv"], LAYERS["llama3-8b-v"]
    dtypes = "float32", "bfloat16"
    cases = [Case(roberta, 4096, dtype, 26, form) for form in ("factored", "dropout") for dtype in dtypes]
    cases += [Case(vit, 4096, dtype, 37, "tiled") for dtype in dtypes]
    cases += [Case(gqa, 512, "float32", 8, form) for form in ("factored", "tiled")]
    # With the first one, cost over tokens.
    cases += [Case(roberta, tokens, "float32", 26, "factored") for tokens in (1, 16, 128, 1024, 32768)]
    return [*cases, Case(gqa, 16, "bfloat16", 8, "factored")]


def gpu_grid() -> Iterator[Case]:
    """The full grid of layers and tokens, in bfloat16."""
    names = ("roberta-base-qv", "roberta-large-qv", "llama-7b-qv", "llama3-8b-v", "llama-7b-mlp")
    tokens = (8192, 1, 16, 1024, 32768, 128)  # most telling first, should time run out
    for count, form, name, k in itertools.product(tokens, FORMS, names, SPLITS):
        yield Case(LAYERS[name], count, "bfloat16", k, form)


def default_cases(device: torch.device) -> list[Case]:
    """`cpu_cases` or `gpu_grid`, as the device is."""
    return list(gpu_grid()) if device.type == "cuda" else cpu_cases()


def suite_cases() -> list[Case]:
    """The few of the pytest-benchmark suite: each form at an encoder's size, small enough to repeat often."""
    return [Case(LAYERS["roberta-base-qv"], 1024, "float32", 26, form) for form in FORMS]
