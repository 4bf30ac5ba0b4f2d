"""Fine-tune a transformers model that classifies texts; save the adapter, load it into a fresh model, merge it.

The model is made here, tiny and untrained, so that this runs anywhere in seconds. For a real one replace `new_model`
and `encode` by AutoModelForSequenceClassification.from_pretrained(...) and its tokenizer; nothing else changes.
"""

import tempfile

import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from genft_kernels import (
    GenFTConfig,
    apply_genft,
    load_adapter,
    merge,
    parameter_groups,
    save_adapter,
    trainable_summary,
)

TEXTS = {
    "who wrote this book": 0, "who sings the song": 0, "who is the mayor": 0, "who painted it": 0,
    "where is the river": 1, "where do they live": 1, "where was it found": 1, "where can one swim": 1,
}  # fmt: skip
WORDS = {word: 3 + index for index, word in enumerate(sorted({word for text in TEXTS for word in text.split()}))}


def new_model() -> RobertaForSequenceClassification:
    torch.manual_seed(0)  # the base has to be the same each time: an adapter belongs to its base
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=64, pad_token_id=0, num_labels=2, **sizes))


def encode(texts) -> dict[str, torch.Tensor]:
    rows = [torch.tensor([1, *(WORDS[word] for word in text.split()), 2]) for text in texts]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return dict(input_ids=input_ids, attention_mask=(input_ids != 0).long())


model = new_model()
config = GenFTConfig.preset("fast", target_modules=["query", "value"], modules_to_save=["classifier"])
apply_genft(model, config)  # in place; all else is frozen
print(trainable_summary(model))

batch, labels = encode(TEXTS), torch.tensor(list(TEXTS.values()))
optimizer = torch.optim.AdamW(parameter_groups(model, 4e-3, head_lr=1e-2))  # as fast as suits each kind
losses = []
for _ in range(30):
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

model.eval()
with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    logits = model(**batch).logits
    save_adapter(model, folder)
    fresh = load_adapter(new_model(), folder).eval()
    assert torch.equal(fresh(**batch).logits, logits)
    merge(fresh)  # as fast as the frozen model
    difference = (fresh(**batch).logits - logits).abs().max().item()
print(f"accuracy {(logits.argmax(-1) == labels).float().mean():.2f}; merging changed the logits by {difference:.1e}")
