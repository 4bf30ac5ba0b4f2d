"""Scikit-learn's digits: a small vision transformer, trained here on 0 to 4, is adapted to 5 to 9.

No package has a pretrained vision transformer of this size, so the first half of the digits stands in for one.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .problem import DemoError, Examples, Places, Problem
from .splits import Example, Split, numbered

TITLE = "digits 5 to 9 (scikit-learn), a small ViT that knows 0 to 4"
WIDTH, LAYERS, HEADS = 128, 6, 4
PRETRAINING_EPOCHS, PRETRAINING_BATCH, PRETRAINING_RATE = 8, 32, 1e-3


class ImageClassifier(nn.Module):
    """A vision transformer, the mean of its patch states, and a head."""

    def __init__(self, encoder: nn.Module, labels: int):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, labels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [batch, labels]."""
        return self.classifier(self.encoder(pixel_values=pixels).last_hidden_state.mean(1))


@dataclass(frozen=True)
class Images(Examples):
    """Pixels [images, 1, 8, 8] and labels."""

    pixels: Tensor
    labels: Tensor

    @classmethod
    def of(cls, examples: list[Example], labels: list[str]) -> "Images":
        """Stack the examples; labels become their position in `labels`."""
        return cls(torch.stack([example.text for example in examples]), numbered(examples, labels))

    def batch(self, rows: list[int]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Pixels and labels of the given rows."""
        return (self.pixels[rows],), self.labels[rows]


def read(digits: str = "56789") -> list[Example]:
    """The images of these digits, pixels from -1 to 1."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DemoError("scikit-learn is not installed; install with: pip install scikit-learn") from error
    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    pairs = zip(pixels, map(str, found.target), strict=True)
    return [Example(image, digit) for image, digit in pairs if digit in digits]


def classification(title: str, parts: Split) -> Problem:
    """The pretrained transformer on these digits."""
    encoder = pretrained()
    train, test = (Images.of(part, parts.labels) for part in (parts.train, parts.test))

    def model() -> nn.Module:
        return ImageClassifier(copy.deepcopy(encoder), len(parts.labels))

    places = Places.query_and_value(encoder, "classifier")
    return Problem(title, train, test, model, places, "accuracy", official="vtab")


def pretrained() -> nn.Module:
    """A vision transformer trained on the other digits, always in the same way."""
    from transformers import ViTConfig, ViTModel

    others = read("01234")
    images = Images.of(others, sorted({example.label for example in others}))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
            image_size=8, patch_size=2, num_channels=1,
        )  # fmt: skip
        model = ImageClassifier(ViTModel(config, add_pooling_layer=False), 5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_RATE)
        for _ in range(PRETRAINING_EPOCHS):
            for rows in torch.randperm(len(images)).split(PRETRAINING_BATCH):
                inputs, labels = images.batch(rows.tolist())
                cross_entropy(model(*inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    return model.encoder.eval()
