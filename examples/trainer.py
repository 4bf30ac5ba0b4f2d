"""The transformers Trainer without PEFT: checkpoints that are adapters, resumed, and the best one loaded at the end.

The model and its data are made here, tiny, so that this runs anywhere in seconds. For a real one replace `new_model` by
AutoModelForSequenceClassification.from_pretrained(...) and the data by a tokenised data set.
"""

import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from genft_kernels import GenFTConfig, apply_genft, load_adapter, parameter_groups
from genft_kernels.integrations.transformers import AdapterCheckpoints


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """A Trainer whose checkpoints hold the adapter, and nothing of the frozen model."""


def new_model() -> BertForSequenceClassification:
    torch.manual_seed(0)  # the base has to be the same each time: an adapter belongs to its base
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return BertForSequenceClassification(BertConfig(vocab_size=64, **sizes))


tokens = torch.randint(1, 64, (256, 4), generator=torch.Generator().manual_seed(1))
data = [dict(input_ids=row, labels=int(row[0] % 2)) for row in tokens]

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=16, num_train_epochs=10, eval_strategy="epoch",
        save_strategy="epoch", load_best_model_at_end=True, logging_strategy="epoch", use_cpu=True, report_to=[],
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    model = apply_genft(new_model(), GenFTConfig.preset("fast", modules_to_save="head"))  # q and v, and the classifier
    groups = parameter_groups(model, 4e-3, head_lr=1e-2)
    optimizer = (torch.optim.AdamW, {"params": groups})
    trainer = AdapterTrainer(
        model, arguments, train_dataset=data[:224], eval_dataset=data[224:], optimizer_cls_and_kwargs=optimizer
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    best = Path(trainer.state.best_model_checkpoint)
    size = sum(path.stat().st_size for path in best.glob("adapter_*"))
    print(f"{best.name} has an adapter of {size / 2**10:.0f} KiB")
    fresh = load_adapter(new_model(), best).eval()
    with torch.no_grad():
        logits = [each.eval()(input_ids=tokens).logits for each in (model, fresh)]
    difference = (logits[0] - logits[1]).abs().max().item()
print(f"the best checkpoint, loaded into a fresh model, changes logits by {difference:.1e}")
