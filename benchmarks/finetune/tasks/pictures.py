"""VTAB-1K and FGVC in the files that their users pass on, for a vision transformer in a folder.

VTAB-1K: lists train800val200 and test (.txt), a path and a class number a line. FGVC: train and test (.json), from path
to class; images lie beside them, or in a folder called images or Images. The test part is what is judged by.
Pixels are prepared as VTAB's and FGVC's users do: 224 x 224, for FGVC cut out of 256 at random (in the middle for the
test) and mirrored at random, and normalised by ImageNet's mean and deviation.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..recipe import Recipe
from .problem import DemoError, Examples, Logits, Places, Problem, quiet_transformers

RECIPE = Recipe(
    epochs=100, batch_size=64, schedule="cosine", warmup=0.1, weight_decay=1e-4, lowest=0.01, clip_norm=float("inf")
)
RATE = 1e-3
SIDE, WHOLE_SIDE = 224, 256
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Listed = list[tuple[Path, int]]


def read_vtab(data: Path) -> tuple[Listed, Listed]:
    """The 1,000 images to train on and those of the test."""
    return _listed(data, data / "train800val200.txt"), _listed(data, data / "test.txt")


def read_fgvc(data: Path) -> tuple[Listed, Listed]:
    """The images to train on and those of the test; classes are numbered in the order of their names in train.json."""
    annotations = [json.loads(_text(data / f"{part}.json")) for part in ("train", "test")]
    classes = {name: number for number, name in enumerate(sorted(set(annotations[0].values())))}
    root = next((data / name for name in ("images", "Images") if (data / name).is_dir()), data)
    for name, kind in annotations[1].items():
        if kind not in classes:
            raise DemoError(f"{data / 'test.json'}: class {kind!r} of {name} is not in train.json")
    train, test = ([(root / name, classes[kind]) for name, kind in part.items()] for part in annotations)
    return train, test


def load(benchmark: str, name: str, data: Path, model: Path) -> Problem:
    """A data set from its folder, with the vision transformer of another."""
    from transformers import AutoModelForImageClassification

    quiet_transformers()
    fgvc = benchmark == "fgvc"
    train, test = (read_fgvc if fgvc else read_vtab)(data)
    classes = 1 + max(kind for _, kind in train)

    def fresh() -> nn.Module:
        found = AutoModelForImageClassification.from_pretrained(model, num_labels=classes, ignore_mismatched_sizes=True)
        return Logits(found, "pixel_values")

    places = Places.query_and_value(fresh(), "classifier")
    parts = Pictures(train, crop=fgvc, random=fgvc), Pictures(test, crop=fgvc)
    title = f"{benchmark}/{name}: {len(train)} to train on, {len(test)} to judge by"
    return Problem(title, *parts, fresh, places, "accuracy", official="vtab", evaluation_batch=64)


@dataclass(frozen=True)
class Pictures(Examples):
    """Images that are read as they are asked for."""

    listed: Listed
    crop: bool = False
    random: bool = False
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", torch.tensor([kind for _, kind in self.listed]))

    def batch(self, rows: list[int]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Pixels [batch, 3, side, side] and labels of the given rows."""
        return (torch.stack([self._pixels(self.listed[row][0]) for row in rows]),), self.labels[rows]

    def _pixels(self, path: Path) -> Tensor:
        from PIL import Image

        with Image.open(path) as image:
            pixels = _tensor(image.convert("RGB").resize((WHOLE_SIDE if self.crop else SIDE,) * 2, Image.BILINEAR))
        room = pixels.shape[-1] - SIDE
        top, left = torch.randint(0, room + 1, (2,)).tolist() if self.random else (room // 2, room // 2)
        pixels = pixels[:, top : top + SIDE, left : left + SIDE]
        return pixels.flip(-1) if self.random and torch.rand(()) < 0.5 else pixels


def _tensor(image: Any) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    mean, deviation = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, DEVIATION))
    return (pixels.permute(2, 0, 1) / 255 - mean) / deviation


def _listed(root: Path, path: Path) -> Listed:
    lines = [line.rsplit(maxsplit=1) for line in _text(path).splitlines() if line.strip()]
    try:
        return [(root / name, int(kind)) for name, kind in lines]
    except ValueError as error:
        raise DemoError(f"{path} is no list of images: every line needs a path and a class number") from error


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error.strerror}") from error
