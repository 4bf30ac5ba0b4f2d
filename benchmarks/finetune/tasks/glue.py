"""GLUE in the files of its own distribution (train.tsv, dev.tsv), for a RoBERTa in a folder, as the official code does.

The dev part is what is judged by, as labels of the test part are not public.
"""

import csv
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..recipe import Recipe
from .problem import DemoError, Examples, Logits, Places, Problem, quiet_transformers
from .splits import Example, numbered

RECIPE = Recipe(epochs=100, batch_size=64, warmup=0.06, weight_decay=5e-4, clip_norm=float("inf"))
RATE = 5e-4


class Columns(NamedTuple):
    """Where a task's files have its sentences and labels: names of their first line, or numbers where it is none."""

    sentences: tuple[str | int, ...]
    label: str | int
    metric: str = "accuracy"
    dev: str = "dev.tsv"


TASKS = {
    "cola": Columns((3,), 1, "matthews"),
    "sst2": Columns(("sentence",), "label"),
    "mrpc": Columns(("#1 String", "#2 String"), "Quality"),
    "stsb": Columns(("sentence1", "sentence2"), "score", "pearson"),
    "qqp": Columns(("question1", "question2"), "is_duplicate"),
    "mnli": Columns(("sentence1", "sentence2"), "gold_label", dev="dev_matched.tsv"),
    "qnli": Columns(("question", "sentence"), "label"),
    "rte": Columns(("sentence1", "sentence2"), "label"),
}


def read(path: Path, columns: Columns) -> list[Example]:
    """The examples of a file, without lines that are cut short, as QQP has; DemoError names what is missing."""
    if not path.exists():
        raise DemoError(f"{path} does not exist")
    wanted = (*columns.sentences, columns.label)
    # The byte order mark is MRPC's, which has a quote here and there that opens nothing.
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if isinstance(columns.label, str):
            header = next(lines, [])
            if missing := [name for name in wanted if name not in header]:
                raise DemoError(f"{path} has no column {missing[0]!r}; its first line has {', '.join(header)}")
            wanted = tuple(header.index(name) for name in wanted)
        *sentences, label = wanted
        rows = [row for row in lines if len(row) > max(wanted)]
    if not rows:
        raise DemoError(f"{path} has no example")
    return [Example([row[column] for column in sentences], row[label]) for row in rows]


def load(name: str, data: Path, model: Path) -> Problem:
    """A task from the folder of its files, with the model and tokenizer of another folder."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if name not in TASKS:
        raise DemoError(f"glue/{name}: there are {', '.join(TASKS)}")
    columns = TASKS[name]
    train, dev = read(data / "train.tsv", columns), read(data / columns.dev, columns)
    regression = columns.metric == "pearson"
    labels = None if regression else sorted({example.label for example in train})
    quiet_transformers()
    tokenizer = AutoTokenizer.from_pretrained(model)

    def fresh() -> nn.Module:
        found = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=len(labels) if labels else 1, ignore_mismatched_sizes=True
        )
        return Logits(found, *Pairs.NAMES)

    places = Places.query_and_value(fresh(), "classifier")
    parts = (Pairs.of(part, labels, tokenizer) for part in (train, dev))
    title = f"glue/{name}: {len(train)} to train on, {len(dev)} to judge by"
    return Problem(title, *parts, fresh, places, columns.metric, official="glue")


class Pairs(Examples):
    """Tokenised sentences or pairs of them, cut off where the model ends, padded by the tokenizer."""

    NAMES = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self, encoded: list[dict[str, list[int]]], labels: Tensor, tokenizer: Any):
        self.encoded, self.labels, self.tokenizer = encoded, labels, tokenizer

    @property
    def lengths(self) -> list[int]:
        return [len(each["input_ids"]) for each in self.encoded]

    @classmethod
    def of(cls, examples: list[Example], labels: list[str] | None, tokenizer: Any) -> "Pairs":
        """Tokenise every example once; labels become their position in `labels`, or the numbers that they are."""
        encoded = [tokenizer(*example.text, truncation=True) for example in examples]
        return cls(encoded, numbered(examples, labels), tokenizer)

    def batch(self, rows: list[int]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Tokens of the given rows, in the order of `NAMES`, and their labels."""
        padded = self.tokenizer.pad([self.encoded[row] for row in rows], padding="longest", return_tensors="pt")
        return tuple(padded[name] for name in self.NAMES if name in padded), self.labels[rows]
