"""The public names, their signatures, and the names within the package's files: what users' code and files rely on.

`python -m tests.helpers.public_names` renews the snapshot that a test compares with.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

import genft_kernels
from genft_kernels import GenFTConfig, apply_genft, save_adapter
from genft_kernels.config import PRESETS
from genft_kernels.integrations.peft import PeftGenFTConfig
from tests.helpers.tiny_models import Encoder, FusedEncoder, FusedGroupedQueryBlock, GroupedQueryBlock

SNAPSHOT = Path(__file__).parents[1] / "packaging" / "public_names.json"
RENEW = "python -m tests.helpers.public_names"

# All functions and classes that these modules define, or list in `__all__`.
MODULES = (
    "genft_kernels",
    "genft_kernels.functional",
    "genft_kernels.reference",
    "genft_kernels.integrations.transformers",
)
# What is promised of others that have more, for use within the package.
PARTS = {
    "genft_kernels.backends": ("explain",),
    "GenFTConfig": ("preset", "for_budget", "to_dict", "from_dict"),
    "GenFTGenerator": ("reset_parameters",),
    "GenFTLinear": (
        "from_linear",
        "adapt_more",
        "parameters_of_generator",
        "delta_weight",
        "merge",
        "unmerge",
        "merged",
    ),
}
_encoder = functools.partial(Encoder, layers=1)
# (model, its configuration); each kind of tensor name is in one of them at least.
ADAPTERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "tied, with modules_to_save": (_encoder, dict(modules_to_save=["classifier"])),
    "untied": (GroupedQueryBlock, dict(target_modules=["v_proj"])),
    "tied and untied shapes": (GroupedQueryBlock, {}),
    "with biases": (_encoder, dict(bias=True)),
    "without shared units": (_encoder, dict(shared_dim=0, zero_delta=False)),
    "without specific units": (_encoder, dict(specific_dim=0)),
    "column stage, with biases": (_encoder, dict(transform="column", bias=True)),
    "row stage, with biases": (_encoder, dict(transform="row", bias=True)),
    "fused blocks": (FusedEncoder, dict(fused_blocks={"qkv": (3, (0, 2))})),
    "unequal fused blocks": (FusedGroupedQueryBlock, dict(fused_blocks={"qkv_proj": ((8, 4, 4), (0, 2))})),
}


def snapshot() -> dict[str, Any]:
    """All of it, as the snapshot's file holds it. Tensors have shared_dim 2, specific_dim 1 and models of width 8."""
    return {
        "modules": {name: _names_of(name) for name in (*MODULES, "genft_kernels.backends")},
        "PeftGenFTConfig": _own_fields(PeftGenFTConfig),
        "presets": {name: _overrides(name) for name in PRESETS},
        "adapter_config.json": _description(),
        "adapter_model.safetensors": {title: _tensors(*made) for title, made in ADAPTERS.items()},
    }


def differences(was: Any, now: Any, path: str = "") -> list[str]:
    """A line for each place at which two snapshots differ."""
    if isinstance(was, list) and isinstance(now, list):
        if was != now and sorted(was) == sorted(now):
            return [f"{path}: the order has changed"]
        was, now = ({line: None for line in lines} for lines in (was, now))
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return [] if was == now else [f"{path}: {was!r} has become {now!r}"]
    lines = [f"{path}/{key} is gone" for key in was if key not in now]
    lines += [f"{path}/{key} is new" for key in now if key not in was]
    return lines + [line for key in was if key in now for line in differences(was[key], now[key], f"{path}/{key}")]


def _names_of(name: str) -> dict[str, Any]:
    module = importlib.import_module(name)
    defined = [
        key for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", None) == name
    ]  # fmt: skip
    names = PARTS.get(name) or getattr(module, "__all__", defined)
    return {key: _signature(getattr(module, key)) for key in sorted(names)}


def _signature(value: Any) -> Any:
    """A function's signature; a class's, with those of its methods; else the kind of thing it is."""
    if inspect.isclass(value):
        public = [name for name, member in vars(value).items() if not name.startswith("_") and callable(member)]
        members = {name: _signature(getattr(value, name)) for name in PARTS.get(value.__name__, sorted(public))}
        return {"()": _text(value), **members}
    return _text(value) if callable(value) else type(value).__name__


def _text(value: Any) -> str | list[str]:
    """A signature as it is written, a line for each parameter where it is long."""
    signature = inspect.signature(value)
    whole = _unquoted(str(signature))
    if len(whole) <= 100:
        return whole
    lines = [_unquoted(str(parameter)) for parameter in signature.parameters.values()]
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        lines.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    result = whole[whole.rindex(")") + 1 :].strip()
    return [*lines, result] if result else lines


def _unquoted(text: str) -> str:
    """Annotations without the quotes that they have while they are not evaluated."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", re.sub(r"ForwardRef\(('[^']*')\)", r"\1", text))


def _own_fields(config: type) -> dict[str, str]:
    """The fields of a dataclass but its bases', with their defaults: PEFT's own differ from version to version."""
    own = vars(config)["__annotations__"]
    return {field.name: repr(field.default) for field in dataclasses.fields(config) if field.name in own}


def _overrides(preset: str) -> dict[str, Any]:
    defaults = GenFTConfig().to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of them has units that never train
        values = GenFTConfig.preset(preset).to_dict()
    return {name: value for name, value in values.items() if value != defaults[name]}


def _saved(model: Callable[[], nn.Module], options: dict[str, Any], directory: Path) -> None:
    adapted = apply_genft(model(), GenFTConfig(**{"shared_dim": 2, "specific_dim": 1, **options}))
    save_adapter(adapted, directory)


def _tensors(model: Callable[[], nn.Module], options: dict[str, Any]) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        _saved(model, options, Path(folder))
        tensors = safetensors.torch.load_file(Path(folder) / "adapter_model.safetensors")
    return {name: str(list(tensors[name].shape)) for name in sorted(tensors)}


def _description() -> dict[str, Any]:
    """The keys of the JSON file with the types of their values, and the version of the format."""
    with tempfile.TemporaryDirectory() as folder:
        _saved(_encoder, {}, Path(folder))
        description = json.loads((Path(folder) / "adapter_config.json").read_text())
    keys = {key: type(value).__name__ for key, value in description.items()}
    fingerprint = next(iter(description["fingerprints"].values()))
    return {
        **keys,
        "format": description["format"],
        "format_version": description["format_version"],
        "config": " ".join(description["config"]),
        "fingerprints": {"<layer>": {key: type(value).__name__ for key, value in fingerprint.items()}},
    }


def main() -> None:
    """Write the snapshot."""
    SNAPSHOT.write_text(json.dumps(snapshot(), indent=1) + "\n")
    print(f"wrote {SNAPSHOT} of genft_kernels {genft_kernels.__version__}")


if __name__ == "__main__":
    main()
