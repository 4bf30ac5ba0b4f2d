"""Labelled items split into training and judging parts, always in the same way, with no item on both sides."""

import random
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import DemoError

SPLIT_SEED = 20251
TEST_SIZE = 1000
# For choosing settings.
VALIDATION_SIZE, VALIDATION_TRAIN_SIZE = 750, 1500


class Example(NamedTuple):
    """One labelled item."""

    text: Any
    label: str


class Split(NamedTuple):
    """Disjoint training and evaluation examples over one sorted list of labels."""

    train: list[Example]
    test: list[Example]
    labels: list[str]


def numbered(examples: Sequence[Example], labels: list[str] | None) -> Tensor:
    """The position of each example's label in `labels`; without these the number that it is."""
    return torch.tensor([float(label) if labels is None else labels.index(label) for _, label in examples])


def same_text_key(text: str) -> str:
    """A key that two spellings of one text share: its letters and digits, whatever the case and spacing."""
    return "".join(re.findall(r"\w+", text.casefold())) or text


def distinct(examples: Iterable[Example]) -> list[Example]:
    """The first spelling of every text, without those that occur under more than one label."""
    first: dict[str, Example] = {}
    ambiguous = set()
    for example in examples:
        key = same_text_key(example.text)
        if first.setdefault(key, example).label != example.label:
            ambiguous.add(key)
    return [example for key, example in first.items() if key not in ambiguous]


def split(pool: Sequence[Example], test_size: int = TEST_SIZE, train_size: int | None = None) -> Split:
    """Shuffle, always in the same way, and cut off a test and a training part; by default all that is left trains."""
    shuffled = list(pool)
    if test_size + (train_size or 1) > len(shuffled):
        raise DemoError(f"cannot take {train_size or 1} training and {test_size} test examples from {len(shuffled)}")
    random.Random(SPLIT_SEED).shuffle(shuffled)
    rest = shuffled[test_size:]
    return Split(rest[:train_size], shuffled[:test_size], sorted({example.label for example in pool}))


def hold_out(whole: Split) -> Split:
    """Split the training part again, for choosing settings without looking at the test part."""
    size = min(VALIDATION_SIZE, len(whole.train) // 4)
    return Split(whole.train[size : size + VALIDATION_TRAIN_SIZE], whole.train[:size], whole.labels)
