"""The package's adapter files: `adapter_model.safetensors` and `adapter_config.json`, nothing about models.

The JSON holds the configuration, a fingerprint of every adapted weight and the digest of the tensor file, so that a
truncated or foreign file is told apart from a good one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch

from ..config import GenFTConfig

TENSORS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
FORMAT = "genft_kernels"
FORMAT_VERSION = 1
MODULES_TO_SAVE = "modules_to_save."

_SAMPLES = 64


class Fingerprint(NamedTuple):
    """What identifies a frozen weight: the update depends on it, so the adapter is worth nothing on another."""

    shape: tuple[int, ...]  # [out, in]
    dtype: str
    norm: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, weight: torch.Tensor) -> Fingerprint:
        """The fingerprint of `weight` [out, in]: Frobenius norm and 64 evenly strided elements."""
        indices = torch.linspace(0, weight.numel() - 1, min(_SAMPLES, weight.numel()), dtype=torch.float64).long()
        rows, columns = indices // weight.shape[1], indices % weight.shape[1]
        samples = weight[rows.to(weight.device), columns.to(weight.device)].double().tolist()
        norm = torch.linalg.vector_norm(weight, dtype=torch.float64).item()
        return cls(tuple(weight.shape), str(weight.dtype).removeprefix("torch."), norm, tuple(samples))

    def difference(self, other: Fingerprint) -> str | None:
        """In words what tells the two apart, or None. Between dtypes, what a cast to 16 bits may change is allowed."""
        if self.shape != other.shape:
            return f"its shape is {list(other.shape)}, not {list(self.shape)}"
        tolerance = 1e-6 if self.dtype == other.dtype else 2**-7
        if not abs(self.norm - other.norm) <= tolerance * min(self.norm, other.norm):  # nor if one is NaN or infinite
            return f"its norm is {other.norm:.6g}, not {self.norm:.6g}"
        small = tolerance * self.norm / (self.shape[0] * self.shape[1]) ** 0.5
        for mine, theirs in zip(self.samples, other.samples, strict=True):
            if abs(mine - theirs) > small + tolerance * abs(mine):
                return "its values differ"
        return None


class AdapterFile(NamedTuple):
    """An adapter as read from a folder, in the package's own names whatever the format was."""

    config: GenFTConfig
    tensors: dict[str, torch.Tensor]
    fingerprints: dict[str, Fingerprint] | None  # by layer path; None where the format has none


def write_adapter_file(directory: str | os.PathLike, adapter: AdapterFile) -> None:
    """Write both files; a failure on the way leaves those that were there before."""
    from .. import __version__

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    payload = safetensors.torch.save(adapter.tensors, {"format": "pt"})
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "genft_kernels_version": __version__,
        "config": adapter.config.to_dict(),
        "tensors_sha256": hashlib.sha256(payload).hexdigest(),
        "fingerprints": {name: fingerprint._asdict() for name, fingerprint in (adapter.fingerprints or {}).items()},
    }
    contents = {TENSORS_FILE: payload, CONFIG_FILE: (json.dumps(description, indent=2) + "\n").encode()}
    temporary = {name: directory / f".{name}.{os.getpid()}" for name in (*contents, "previous")}
    tensors_path, previous = directory / TENSORS_FILE, temporary["previous"]
    try:
        for name, content in contents.items():
            temporary[name].write_bytes(content)
        if tensors_path.exists():
            shutil.copyfile(tensors_path, previous)
        os.replace(temporary[TENSORS_FILE], tensors_path)
        try:
            os.replace(temporary[CONFIG_FILE], directory / CONFIG_FILE)
        except BaseException:  # the two files belong together
            if previous.exists():
                os.replace(previous, tensors_path)
            else:
                tensors_path.unlink()
            raise
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def read_adapter_file(directory: str | os.PathLike) -> AdapterFile:
    """Read and verify the two files.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: one is damaged, of another format or of a newer version; the message names the file.
    """
    directory = Path(directory)
    description = read_json(directory / CONFIG_FILE)
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{directory / CONFIG_FILE} is not an adapter of {FORMAT}: format={description.get('format')!r}"
        )
    if description.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{directory / CONFIG_FILE} has format_version={description.get('format_version')!r}; "
            f"this package reads {FORMAT_VERSION}"
        )
    payload = (directory / TENSORS_FILE).read_bytes()
    if hashlib.sha256(payload).hexdigest() != description.get("tensors_sha256"):
        raise ValueError(
            f"{directory / TENSORS_FILE} is truncated, or not the file that {CONFIG_FILE} was written with"
        )
    try:
        config = GenFTConfig.from_dict(description["config"])
        fingerprints = {
            name: Fingerprint(tuple(entry["shape"]), entry["dtype"], entry["norm"], tuple(entry["samples"]))
            for name, entry in description["fingerprints"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{directory / CONFIG_FILE} is damaged: {error!r}") from error
    return AdapterFile(config, parse_tensors(payload, directory / TENSORS_FILE), fingerprints)


def read_json(path: Path) -> dict:
    """The JSON object in `path`; ValueError, with the path, if there is none in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def parse_tensors(payload: bytes, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; ValueError, with the path, if it is damaged."""
    try:
        return safetensors.torch.load(payload)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
