"""Small generated questions and a small random encoder, for the fine-tuning comparison."""

import random

import torch

from benchmarks.finetune.tasks.splits import Example

WORDS = {
    "NUM": ["many", "much", "count", "year"],
    "LOC": ["where", "city", "country", "river"],
    "HUM": ["who", "name"],
}


def tokenizer(texts, truncation=True, max_length=64):
    """Every word a number (a checksum, since ``hash`` changes between processes); 0 pads."""
    return {"input_ids": [[1 + sum(map(ord, word)) % 59 for word in text.split()] for text in texts]}


tokenizer.pad_token_id = 0


def encoder():
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=60, max_position_embeddings=32, **sizes)
    return transformers.BertModel(config, add_pooling_layer=False)


def questions(count, seed=0):
    draw = random.Random(seed)
    made = {}
    while len(made) < count:
        label = draw.choice(list(WORDS))
        filler = [f"w{draw.randrange(40)}" for _ in range(draw.randrange(2, 7))]
        text = " ".join([draw.choice(WORDS[label]), *filler])
        made[text] = Example(text, label)
    return list(made.values())
