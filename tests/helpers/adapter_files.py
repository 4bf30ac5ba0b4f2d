"""Adapters on disk for the tests of files: small models, and how to change what was written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors.torch
import torch

from genft_kernels import GenFTConfig, apply_genft
from genft_kernels.files import names
from genft_kernels.files.format import CONFIG_FILE, TENSORS_FILE
from tests.helpers.tiny_models import Encoder, randomise

QUERY = "layers.1.attention.query"


def config(**settings) -> GenFTConfig:
    return GenFTConfig(**{"shared_dim": 2, "specific_dim": 1, "inner_activation": "tanh", **settings})


def base(make=Encoder):
    """The same base model for each call."""
    torch.manual_seed(7)
    return make().eval()


def adapted(make=Encoder, **settings):
    return randomise(apply_genft(base(make), config(**settings)))


SAVED = dict(modules_to_save=["classifier"])


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def edit_config(directory: Path, change) -> None:
    path = directory / CONFIG_FILE
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def edit_tensors(directory: Path, change) -> None:
    """Change the tensors, by their names in the model, and the digest that goes with them."""
    path = directory / TENSORS_FILE
    tensors = names.all_in_model(safetensors.torch.load_file(path))
    change(tensors)
    payload = safetensors.torch.save({names.in_file(name): tensor for name, tensor in tensors.items()})
    path.write_bytes(payload)
    edit_config(directory, lambda d: d.update(tensors_sha256=hashlib.sha256(payload).hexdigest()))
