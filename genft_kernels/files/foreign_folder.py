"""Folders that hold something else than an adapter of GenFT's: what it is, and what to do with it."""

from __future__ import annotations

import re
from pathlib import Path

from ..arguments import shown
from .format import CONFIG_FILE, PEFT_TYPE
from .untrusted import read_json

_MODEL_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})")


def explain_foreign_folder(directory: Path) -> None:
    """Raise for a folder that is known to hold something else.

    Raises:
        ValueError: an adapter of another method, as PEFT saves it; or a whole model, as a `Trainer`'s checkpoint.
        FileNotFoundError: a folder of checkpoints.
    """
    config = directory / CONFIG_FILE
    kind = read_json(config).get("peft_type") if config.exists() else None
    if kind not in (None, PEFT_TYPE):
        raise ValueError(
            f"{directory} holds an adapter of PEFT's of the kind peft_type={shown(kind)}, not {PEFT_TYPE!r}: "
            "peft.PeftModel.from_pretrained(model, directory) loads it"
        )
    if config.exists() or not directory.is_dir():
        return
    if any((directory / name).exists() for name in _MODEL_FILES):
        raise ValueError(
            f"{directory} holds a whole model and no adapter, as save_pretrained and a Trainer's checkpoints do: "
            "resume from it by trainer.train(resume_from_checkpoint=...), or call apply_genft on the base model and "
            "load the file by load_state_dict. Checkpoints that are adapters are AdapterCheckpoints' of "
            "genft_kernels.integrations.transformers"
        )
    steps = [int(match[1]) for path in directory.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    if steps:
        raise FileNotFoundError(f"no adapter in {directory} but checkpoints: name one, such as checkpoint-{max(steps)}")
