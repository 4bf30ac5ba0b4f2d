"""The package's adapter files: `adapter_model.safetensors` and `adapter_config.json`, nothing about models.

The JSON holds the configuration, a fingerprint of every adapted weight and the digest of the tensor file, so that a
truncated or foreign file is told apart from a good one (docs/architecture.md#files).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch

from .._version import __version__
from ..arguments import about
from ..config import ALL_LINEAR, GenFTConfig
from ..matching import full_matches_in_time
from . import folder, names
from .fingerprint import Fingerprint
from .untrusted import parse_tensors, read_file, read_json

TENSORS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
FORMAT = "genft_kernels"
FORMAT_VERSION = 2  # 1 had the tensors under their names in the model
PEFT_TYPE = "GENFT"  # as which PEFT opens the files, by genft_kernels/integrations/peft

# The description of a tensor file that is about to take its place, within that of the one before.
_NEXT = "next"
_ATTEMPTS = 100


class AdapterFile(NamedTuple):
    """An adapter as read from a folder, in the package's own names whatever the format was."""

    config: GenFTConfig
    tensors: dict[str, torch.Tensor]
    fingerprints: dict[str, Fingerprint] | None  # by layer path; None where the format has none


def write_adapter_file(directory: str | os.PathLike, adapter: AdapterFile, base: Mapping[str, Any]) -> None:
    """Write both files, so that at any moment the folder holds one whole adapter, the earlier one or this.

    `base` has the fields by which PEFT finds the model, for its classes that load a model with its adapter.
    First the JSON announces the new description beside the old one, then the tensors take their place, which is the
    moment that counts, and then the JSON drops the old description. A reader takes the one whose digest fits.

    Raises:
        OSError: the folder cannot be written; what was there before still is.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {names.in_file(name): tensor for name, tensor in adapter.tensors.items()}
    payload = safetensors.torch.save(tensors, {"format": "pt"})
    description = {
        "peft_type": PEFT_TYPE,
        **base,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "genft_kernels_version": __version__,
        "config": adapter.config.to_dict(),
        "tensors_sha256": hashlib.sha256(payload).hexdigest(),
        "fingerprints": {name: fingerprint.entry() for name, fingerprint in (adapter.fingerprints or {}).items()},
    }
    tensors_path, config_path = directory / TENSORS_FILE, directory / CONFIG_FILE
    with folder.only_saver(directory), contextlib.ExitStack() as staged:

        def stage(path: Path, content: bytes) -> Path:
            place = folder.stage(path, content)
            staged.callback(place.unlink, missing_ok=True)
            return place

        before = read_file(config_path) if config_path.exists() else None
        new_tensors, new_config = stage(tensors_path, payload), stage(config_path, _encoded(description))
        announced = stage(config_path, _encoded({**_earlier_description(config_path), _NEXT: description}))
        folder.put(announced, config_path)
        try:
            os.replace(new_tensors, tensors_path)
        except OSError:  # then it has not happened
            if before is None:
                config_path.unlink()
            else:
                folder.put(stage(config_path, before), config_path)
            raise
        folder.sync_folder(directory)
        folder.put(new_config, config_path)


def read_adapter_file(directory: str | os.PathLike) -> AdapterFile:
    """Read and verify the two files.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: one is damaged, of another format or of a newer version; the message names the file.
    """
    config_path, tensors_path = Path(directory) / CONFIG_FILE, Path(directory) / TENSORS_FILE
    for _ in range(_ATTEMPTS):
        read = read_json(config_path)
        payload = read_file(tensors_path)
        digest = hashlib.sha256(payload).hexdigest()
        for description in (read.get(_NEXT), read):
            if isinstance(description, dict) and description.get("tensors_sha256") == digest:
                return _parsed(description, payload, config_path, tensors_path)
        if read_json(config_path) == read:  # else a saver came between the two
            break
    _check_format(read, config_path)
    raise ValueError(f"{tensors_path} is truncated, or not the file that {CONFIG_FILE} was written with")


def is_ours(directory: Path) -> bool:
    """Whether `directory` has an adapter of this package, or is about to."""
    path = directory / CONFIG_FILE
    if not path.exists():
        return False
    description = read_json(path)
    return description.get("format") == FORMAT or (_NEXT in description and (directory / TENSORS_FILE).exists())


def _parsed(description: dict[str, Any], payload: bytes, config_path: Path, tensors_path: Path) -> AdapterFile:
    _check_format(description, config_path)
    with _damaged(config_path):
        if not isinstance(description.get("config"), dict):
            raise ValueError("'config' is not an object")
        fingerprints = parsed_fingerprints(description.get("fingerprints"))
    with _damaged(config_path, "config: "):
        check_patterns(description["config"])
        config = GenFTConfig.from_dict(description["config"])
    tensors = parse_tensors(payload, tensors_path)
    if description["format_version"] > 1:
        with _damaged(tensors_path):
            tensors = names.all_in_model(tensors)
    return AdapterFile(config, tensors, fingerprints)


@contextlib.contextmanager
def _damaged(what: object, part: str = "") -> Iterator[None]:
    """Within the context what is wrong is a ValueError that says so of `what`, and of which part."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is damaged: {part}{error}") from None


def check_patterns(config: Mapping[str, Any]) -> None:
    """ValueError for a regular expression in a file's configuration that is none, or that takes too long to compile."""
    for field in ("target_modules", "exclude_modules"):
        pattern = config.get(field)
        if isinstance(pattern, str) and pattern != ALL_LINEAR:
            with about(field):
                full_matches_in_time(pattern, ())


def parsed_fingerprints(entries: object) -> dict[str, Fingerprint]:
    """The fingerprints of a JSON object; ValueError that names the one that is none."""
    if not isinstance(entries, dict):
        raise ValueError("'fingerprints' is not an object")
    fingerprints = {}
    for name, entry in entries.items():
        try:
            fingerprints[name] = Fingerprint.parsed(entry)
        except ValueError as error:
            raise ValueError(f"the fingerprint of {name[:200]!r}: {error}") from None
    return fingerprints


def _check_format(description: dict[str, Any], path: Path) -> None:
    versions = tuple(range(1, FORMAT_VERSION + 1))
    for key, ours in (("format", (FORMAT,)), ("format_version", versions)):
        value = description.get(key)
        if type(value) is not type(ours[0]) or value not in ours:
            read = " and ".join(map(str, ours))
            raise ValueError(f"{path} has {key}={str(value)[:80]}; this package reads {read}")


def _earlier_description(path: Path) -> dict[str, Any]:
    """The object in `path` without what a saver that was killed has announced, unless that had come true."""
    try:
        earlier = read_json(path)
    except (FileNotFoundError, ValueError):
        return {}
    announced = earlier.pop(_NEXT, None)
    if isinstance(announced, dict) and announced.get("tensors_sha256") == _digest(path.with_name(TENSORS_FILE)):
        return announced
    return earlier


def _digest(path: Path) -> str | None:
    return hashlib.sha256(read_file(path)).hexdigest() if path.exists() else None


def _encoded(description: dict[str, Any]) -> bytes:
    return (json.dumps(description, indent=2, allow_nan=False) + "\n").encode()
