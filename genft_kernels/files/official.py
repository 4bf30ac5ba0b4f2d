"""Checkpoints of the official GenFT code, read into this package's names: the PEFT variant's and the ViT variant's.

Nothing is guessed: every tensor must be there in the shape that the settings call for, and every refusal names the
file and all the keys at fault. Whether there are biases is told from the tensors, because the official settings
do not say so reliably.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..adapted_model import GENERATORS
from ..arguments import about, is_finite, is_integer, shown
from ..checks import SUPPORTED_DTYPES
from ..config import GenFTConfig
from .format import CONFIG_FILE, TENSORS_FILE, AdapterFile
from .names import MODULES_TO_SAVE
from .untrusted import load_checkpoint, parse_tensors, read_file, read_json, read_yaml

VIT_TENSORS_FILE = "best_model.pt"
VIT_CONFIG_FILE = "args.yaml"

# Spelt in any case; every other spelling, 'None' and null included, is the identity in the official code.
_ACTIVATIONS = {"relu": "relu", "leakyrelu": "leaky_relu", "gelu": "gelu", "tanh": "tanh"}
_INITS = {"zero": "zeros", "kaiming_uniform": "kaiming_uniform", "xavier_uniform": "xavier_uniform", "normal": "normal"}
_NEEDED = ("generator_share_dim", "individual_features", "ratio_W0", "inner_activation", "outer_activation", "scaling")

_PEFT_GENERATOR = "base_model.generator"
_PEFT_BASE = "base_model.model."
_PEFT_TARGET = re.compile(r"base_model\.model\.(.+?)\.(?:generator\.genft_share_|genft_individual_).+")
_VIT_GENERATOR = "blocks.0.attn.gen"
_VIT_BLOCK = re.compile(r"blocks\.(0|[1-9]\d{0,8})\.attn\.genft_individual_.+")


def read_official(directory: str | os.PathLike) -> AdapterFile:
    """Read a checkpoint of the official code: configuration and tensors by this package's names, no fingerprints.

    Args:
        directory: of the PEFT variant, with `adapter_config.json` and `adapter_model.safetensors`, or of the ViT
            variant, with `best_model.pt` and `args.yaml`.

    Raises:
        FileNotFoundError: neither variant's files are there; the message lists them.
        ValueError: a file is damaged, or holds what this package cannot represent, or tensors are missing,
            unexpected, of another shape or at odds with one another; the message names the file and the keys.
        ImportError: the ViT variant without PyYAML.
    """
    directory = Path(directory)
    if (directory / CONFIG_FILE).exists() and (directory / TENSORS_FILE).exists():
        return _read_peft(directory)
    if (directory / VIT_TENSORS_FILE).exists():
        return _read_vit(directory)
    message = (
        f"no adapter in {directory}: looked for {CONFIG_FILE} with {TENSORS_FILE}, "
        f"and for {VIT_TENSORS_FILE} with {VIT_CONFIG_FILE}"
    )
    inside = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
    raise FileNotFoundError(message + (f". There are adapters in its subfolders {', '.join(inside)}" if inside else ""))


def _read_peft(directory: Path) -> AdapterFile:
    path = directory / TENSORS_FILE
    settings = _Settings(directory / CONFIG_FILE, read_json(directory / CONFIG_FILE), dropout_key="drop")
    kind = settings.values.get("peft_type")
    if kind not in (None, "GENFT"):
        raise ValueError(f"{settings.path}: peft_type is {shown(kind)}, not 'GENFT'")
    if settings.values.get("fan_in_fan_out"):
        # The official code resets it over nn.Linear, so it stands for Conv1D, on which that code fails.
        raise ValueError(
            f"{settings.path}: fan_in_fan_out={shown(settings.values['fan_in_fan_out'])} (Conv1D) is not supported"
        )
    r = settings.count("individual_features")
    if settings.count("generator_share_dim") == 0:
        raise ValueError(
            f"{settings.path}: generator_share_dim=0 cannot be represented: the official code then has no generator "
            "and adds the plain product of the individual matrices, with dropout even in evaluation"
        )
    tensors = parse_tensors(read_file(path), path)
    targets = sorted({match[1] for match in map(_PEFT_TARGET.fullmatch, tensors) if match})
    saved = _modules_to_save((key for key in tensors if not _PEFT_TARGET.fullmatch(key)), settings)

    layout = _Layout.of(path, settings, tensors)
    copies = [_PEFT_GENERATOR, *(f"{_PEFT_BASE}{target}.generator" for target in targets)]
    expected = {f"{copy}.{key}": shape for copy in copies for key, (_, shape) in layout.shared.items()}
    expected |= {
        f"{_PEFT_BASE}{target}.{key}": shape for target in targets for key, (_, shape) in layout.specific.items()
    }
    expected |= {key: tuple(tensors[key].shape) for key in saved}
    _check_tensors(path, tensors, expected, layout)
    _check_copies(path, tensors, copies, layout.shared)
    if not targets:
        raise ValueError(f"{path} names no adapted layer: no key is {_PEFT_BASE}<layer>.generator... or .genft_...")

    config = settings.config(
        bias=layout.bias,
        weight_ratio=settings.number("ratio_W0") if r else 1.0,  # the official code then passes W as it is
        ratio_scope="weight",
        delta_layout="out_in",
        init_shared="linear",
        target_modules=tuple(targets),
        modules_to_save=tuple(sorted(set(saved.values()))) or None,
    )
    layers = {f"{_PEFT_BASE}{target}": target for target in targets}
    ours = layout.in_our_names(tensors, _PEFT_GENERATOR, layers)
    ours |= {MODULES_TO_SAVE + key.removeprefix(_PEFT_BASE): tensors[key] for key in saved}
    return AdapterFile(config, ours, None)


def _modules_to_save(keys: Iterable[str], settings: _Settings) -> dict[str, str]:
    """For each key of a module trained in full: the path of that module.

    The settings name these modules by the ends of their paths; where they name none, the owner of the tensor is it.
    """
    names = settings.values.get("modules_to_save") or ()
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{settings.path}: modules_to_save must be a list of names, got {shown(names)}")
    names = tuple(names)
    parents = {}
    for key in keys:
        parts = key.removeprefix(_PEFT_BASE).split(".")[:-1]
        if key.startswith(_PEFT_BASE) and parts and "genft_" not in key:
            parents[key] = [".".join(parts[: n + 1]) for n in range(len(parts))]
    owners = {paths[-1] for paths in parents.values()}
    found = {}
    for key, paths in parents.items():
        # As PEFT matches: "classifier" also means "pre_classifier". The outermost match holds all within.
        matching = [path for path in paths if (path.endswith(names) if names else path in owners)]
        if matching:
            found[key] = matching[0]
    return found


def _read_vit(directory: Path) -> AdapterFile:
    path = directory / VIT_TENSORS_FILE
    config_path = directory / VIT_CONFIG_FILE
    if not config_path.exists():
        raise ValueError(
            f"{config_path} is missing, so these settings of {VIT_TENSORS_FILE} are unknown: "
            f"{', '.join((*_NEEDED, 'dpr'))}; put the {VIT_CONFIG_FILE} of its training beside it"
        )
    settings = _Settings(config_path, read_yaml(config_path), dropout_key="dpr")
    tensors = load_checkpoint(path)

    layout = _Layout.of(path, settings, tensors)
    expected = {f"{_VIT_GENERATOR}.{key}": shape for key, (_, shape) in layout.shared.items()}
    found = {int(match[1]) for match in map(_VIT_BLOCK.fullmatch, tensors) if match}
    blocks = sorted(found | set(range(max(len(found), 1))))  # a gap in the numbers is a missing block
    if settings.count("individual_features"):
        expected |= {f"blocks.{n}.attn.{key}": shape for n in blocks for key, (_, shape) in layout.specific.items()}
    head = _head_shapes(settings, tensors, layout.width)
    _check_tensors(path, tensors, expected | head, layout)

    config = settings.config(
        bias=layout.bias,
        weight_ratio=settings.number("ratio_W0"),
        ratio_scope="all",
        delta_layout="in_out",
        init_shared="trunc_normal",
        # The official model adapts every block, and without specific units the file does not say how many there are:
        # as a pattern of whole paths it also finds out a base model of another depth.
        target_modules=r"blocks\.\d+\.attn\.qkv",
        fused_blocks={"qkv": (3, (0, 2))},
        modules_to_save=("head",) if head else None,
    )
    layers = {f"blocks.{n}.attn": f"blocks.{n}.attn.qkv" for n in blocks}
    ours = layout.in_our_names(tensors, _VIT_GENERATOR, layers)
    return AdapterFile(config, ours | {MODULES_TO_SAVE + key: tensors[key] for key in head}, None)


def _head_shapes(settings: _Settings, tensors: Mapping[str, torch.Tensor], width: int) -> dict[str, tuple[int, ...]]:
    if settings.values.get("class_num") is not None:
        classes = settings.count("class_num")
    else:
        known = [tensors[key].shape[0] for key in ("head.weight", "head.bias") if key in tensors and tensors[key].dim()]
        classes = known[0] if known else 0
    return {"head.weight": (classes, width), "head.bias": (classes,)} if classes else {}


class _Settings:
    """The official settings of one file, under their official names."""

    def __init__(self, path: Path, values: Mapping[str, Any], *, dropout_key: str) -> None:
        self.path, self.values, self.dropout_key = path, values, dropout_key
        missing = [key for key in (*_NEEDED, dropout_key) if key not in values]
        if missing:
            raise ValueError(f"{path}: missing settings: {', '.join(missing)}")

    def count(self, key: str) -> int:
        value = self.values[key]
        if not is_integer(value) or not 0 <= value < 2**31:
            raise ValueError(
                f"{self.path}: {key} must be an integer of at least 0, and below 2**31, got {shown(value)}"
            )
        return value

    def number(self, key: str) -> float:
        value = self.values[key]
        if not is_finite(value):
            raise ValueError(f"{self.path}: {key} must be a finite number, got {shown(value)}")
        return float(value)

    def config(self, **fields: Any) -> GenFTConfig:
        """The configuration that these settings and `fields` amount to."""
        dropout = self.number(self.dropout_key)
        if not 0 <= dropout < 1:
            raise ValueError(f"{self.path}: {self.dropout_key} must be in [0, 1), got {dropout}")
        fields |= {
            field: _INITS[self.values[key]]
            for field, key in (("init_specific_down", "individual_init_a"), ("init_specific_up", "individual_init_b"))
            if self.values.get(key) in tuple(_INITS)
        }
        for field in ("inner_activation", "outer_activation"):
            fields[field] = _ACTIVATIONS.get(str(self.values[field]).lower(), "identity")
        with about(str(self.path)):
            return GenFTConfig(
                shared_dim=self.count("generator_share_dim"),
                specific_dim=self.count("individual_features"),
                dropout=dropout,
                scaling=self.number("scaling"),
                zero_delta=False,
                **fields,
            )


class _Layout(NamedTuple):
    """One checkpoint's tensors: official key, below its module, -> (this package's name, shape)."""

    width: int  # d of the square weights
    bias: bool
    meaning: str  # what the shapes follow from, in words
    shared: dict[str, tuple[str, tuple[int, ...]]]
    specific: dict[str, tuple[str, tuple[int, ...]]]

    @classmethod
    def of(cls, path: Path, settings: _Settings, tensors: Mapping[str, torch.Tensor]) -> _Layout:
        s, r = settings.count("generator_share_dim"), settings.count("individual_features")
        bias = any("genft_share_" in key and key.endswith(".bias") for key in tensors)
        if s + r == 0:
            raise ValueError(f"{settings.path}: generator_share_dim and individual_features are both 0")
        d = _width(path, tensors)
        # Weights of several shapes show as wrong ones, hence the words.
        meaning = f"generator_share_dim={s}, individual_features={r} and one generator for square weights of width {d}"
        shared: dict[str, tuple[str, tuple[int, ...]]] = {}
        for number, stage in (("1", "column"), ("2", "row")):
            shared[f"genft_share_{number}_a.linear.weight"] = (f"{stage}_down", (s, d))
            shared[f"genft_share_{number}_b.linear.weight"] = (f"{stage}_up", (d, s))
            if bias:
                shared[f"genft_share_{number}_a.linear.bias"] = (f"{stage}_down_bias", (s + r,))
                shared[f"genft_share_{number}_b.linear.bias"] = (f"{stage}_up_bias", (d,))
        specific: dict[str, tuple[str, tuple[int, ...]]] = {
            "genft_individual_weight_a": ("specific_down", (r, d)),
            "genft_individual_weight_b": ("specific_up", (d, r)),
        }
        return cls(d, bias, meaning, shared, specific)

    def in_our_names(
        self, tensors: Mapping[str, torch.Tensor], generator: str, layers: Mapping[str, str]
    ) -> dict[str, torch.Tensor]:
        """The tensors of `generator`, and those of `layers`, by the paths of their owners there and here.

        This package has no empty ones.
        """
        places = [(self.shared, generator, f"{GENERATORS}.{self.width}x{self.width}")]
        places += [(self.specific, owner, layer) for owner, layer in layers.items()]
        return {
            f"{layer}.{name}": tensors[f"{owner}.{key}"]
            for names, owner, layer in places
            for key, (name, shape) in names.items()
            if 0 not in shape
        }


def _width(path: Path, tensors: Mapping[str, torch.Tensor]) -> int:
    """d by majority, so that it is the odd tensor out which gets reported."""
    widths: Counter[int] = Counter()
    for key, tensor in tensors.items():
        side = re.search(r"genft_(?:individual_weight|share_[12])_([ab])(?:\.linear\.weight)?$", key)
        if side and tensor.dim() == 2:
            widths[tensor.shape[1] if side[1] == "a" else tensor.shape[0]] += 1
    if not widths:
        raise ValueError(f"{path} has no tensors of GenFT: no key is genft_share_... or genft_individual_weight_...")
    return widths.most_common(1)[0][0]


def _check_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], layout: _Layout
) -> None:
    """Raise, with every key at fault, unless `tensors` is what is expected; an empty tensor may be absent."""
    missing = [key for key, shape in expected.items() if key not in tensors and 0 not in shape]
    unexpected = [key for key in tensors if key not in expected]
    shapes = [
        f"{key} is {list(tensors[key].shape)}, not {list(shape)}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    dtypes = [
        f"{key} is {tensor.dtype}"
        for key, tensor in tensors.items()
        if "genft_" in key and tensor.dtype not in SUPPORTED_DTYPES
    ]
    wrong = {"missing": missing, "unexpected": unexpected}
    wrong |= {f"wrong shape for {layout.meaning}:": shapes, "unsupported dtype:": dtypes}
    if problems := [f"{what} {', '.join(keys)}" for what, keys in wrong.items() if keys]:
        raise ValueError(f"{path}: {'; '.join(problems)}")


def _check_copies(path: Path, tensors: Mapping[str, torch.Tensor], copies: list[str], names: Iterable[str]) -> None:
    """Raise unless the copies of the generator are one; where they differ, which of them was meant is unknown."""
    for name in names:
        first, *others = (f"{copy}.{name}" for copy in copies)
        for other in others:
            a, b = tensors[first], tensors[other]
            if a.dtype != b.dtype or not torch.allclose(a, b, rtol=0, atol=0, equal_nan=True):
                raise ValueError(f"{path}: {first} and {other} are copies of one tensor but differ")
