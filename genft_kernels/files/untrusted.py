"""Files that somebody else may have made, read within bounds: time and memory in proportion to their size."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from ..arguments import shown

_JSON_BYTES = 64 * 2**20  # 2,000 layers have fingerprints of 3 MB
_YAML_BYTES = 2**20
_YAML_DEPTH = 20


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ValueError, with the path, if there is none in it."""
    try:
        value = json.loads(read_file(path, _JSON_BYTES).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def read_file(path: Path, limit: int | None = None) -> bytes:
    """The content of `path`; ValueError if it is longer than `limit`, or no file with an end, such as a pipe."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        content = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise ValueError(f"it is longer than {limit >> 20} MiB")
    return content


def parse_tensors(payload: bytes, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; ValueError, with the path, if it is damaged."""
    try:
        return safetensors.torch.load(payload)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or truncated: {str(error)[:200]}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in `path`; ValueError, with the path, if there is none in it, ImportError without PyYAML."""
    try:
        import yaml  # of use here only
    except ImportError as error:
        raise ImportError(f"reading {path} needs PyYAML: pip install pyyaml") from error
    try:
        text = read_file(path, _YAML_BYTES).decode()
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has aliases, with which a short text can stand for an endless one")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _YAML_DEPTH:  # the parser's time is its square
                raise ValueError(f"it is nested more than {_YAML_DEPTH} deep")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a mapping of settings")
    return values


def load_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The tensors that `torch.save` has put under "model" into `path`; ValueError, with the path, if there are none.

    Nothing is run. Neither compressed contents nor strides of zero may stand for more than the file holds.
    """
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path) and sum(entry.file_size for entry in zipfile.ZipFile(path).infolist()) > size:
            raise ValueError("it is compressed")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises on a damaged file is not documented
        raise ValueError(f"{path} is damaged, truncated or holds more than plain tensors") from error
    tensors = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} does not hold the tensors of a model under 'model'")
    others = [shown(key) for key, value in tensors.items() if not (isinstance(key, str) and _is_plain(value))]
    if others:
        raise ValueError(f"{path}: not plain tensors: {', '.join(others[:9])}")
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > size:
        raise ValueError(f"{path}: its tensors claim to be larger than the file")
    return {key: tensor.detach() for key, tensor in tensors.items()}


def _is_plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
