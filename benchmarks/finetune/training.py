"""One training run: the same budget, batches and schedule whatever the method."""

import hashlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.measure import memory
from benchmarks.measure.rows import Row

from .data import DemoError
from .encoder import Encoded, fresh_classifier
from .methods import METHODS, settings_of, trainable_parameters

EVALUATION_BATCH = 128
WARMUP_SHARE, CLIP_NORM = 0.1, 1.0


class Diverged(DemoError):
    """A gradient was not finite."""


@dataclass(frozen=True)
class Job:
    """What is trained, and on which budget, the same for every method."""

    method: str
    rate: float
    seed: int
    epochs: int = 3
    batch_size: int = 32

    def batches(self, examples: int) -> list[list[int]]:
        """The rows of every batch of the whole run: a fresh permutation each epoch."""
        generator = torch.Generator().manual_seed(self.seed)
        order = []
        for _ in range(self.epochs):
            rows = torch.randperm(examples, generator=generator).tolist()
            order += [rows[start : start + self.batch_size] for start in range(0, examples, self.batch_size)]
        return order


def rate_factor(step: int, steps: int) -> float:
    """What the rate is multiplied by at `step` of `steps`: up over the warm-up, then down to zero, both linearly."""
    warmup = max(1, round(steps * WARMUP_SHARE))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup), 1.0)


def prepare(encoder: nn.Module, labels: int, job: Job) -> nn.Module:
    """A fresh copy of the encoder with a head, adapted; the seed fixes every initial value."""
    torch.manual_seed(job.seed)
    return METHODS[job.method].adapt(fresh_classifier(encoder, labels))


def train(
    model: nn.Module, train_set: Encoded, test_set: Encoded, job: Job, say: Callable[[str], None] = lambda text: None
) -> Row:
    """Train `model` in place and evaluate after every epoch; no epoch is picked afterwards.

    Returns:
        A row: settings, accuracy and loss on the test set after each epoch, the mean training loss of each, the median
        of a step's time, and the peak memory of one more, unused step.
    """
    batches = job.batches(len(train_set))
    an_epoch = len(batches) // job.epochs
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, len(batches)))
    row = {
        "method": job.method, "seed": job.seed, "rate": job.rate, "trainable": trainable_parameters(model),
        "settings": settings_of(model), "batches": hashlib.sha256(repr(batches).encode()).hexdigest()[:12],
        "accuracy": [], "loss": [], "training_loss": [],
    }  # fmt: skip
    torch.manual_seed(job.seed)  # the methods drew different numbers for their initial values
    losses, seconds = [], []
    for step, rows in enumerate(batches, start=1):
        model.train()
        started = time.perf_counter()
        ids, mask, labels = train_set.batch(rows)
        loss = cross_entropy(model(ids, mask), labels)
        loss.backward()
        if not nn.utils.clip_grad_norm_(parameters, CLIP_NORM).isfinite():
            raise Diverged(f"{job.method} with rate {job.rate:g} diverged at step {step} of {len(batches)}")
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
        if step % an_epoch == 0:
            for name, value in evaluate(model, test_set).items():
                row[name].append(value)
            row["training_loss"].append(statistics.mean(losses[-an_epoch:]))
            say(f"step {step} of {len(batches)}, {sum(seconds):.0f} s: accuracy {row['accuracy'][-1]:.3f}")
    peak = step_bytes(model, train_set, job.batch_size)
    return row | {"step_ms": round(1e3 * statistics.median(seconds), 3), "peak_bytes": peak}


@torch.no_grad()
def logits_of(model: nn.Module, data: Encoded) -> torch.Tensor:
    """Logits [examples, labels] in evaluation mode, in the order of `data`."""
    model.eval()
    rows = data.by_length()
    parts = [rows[start : start + EVALUATION_BATCH] for start in range(0, len(rows), EVALUATION_BATCH)]
    outputs = torch.cat([model(*data.batch(part)[:2]) for part in parts])
    return torch.empty_like(outputs).index_copy_(0, torch.tensor(rows), outputs)


def evaluate(model: nn.Module, data: Encoded) -> dict[str, float]:
    """Accuracy and mean loss."""
    logits = logits_of(model, data)
    hits = (logits.argmax(-1) == data.labels).sum().item()
    return {"accuracy": hits / len(data), "loss": cross_entropy(logits, data.labels).item()}


def step_bytes(model: nn.Module, data: Encoded, batch_size: int) -> int:
    """Peak tensor memory of one forward and backward over the longest texts, beyond weights and optimizer."""
    ids, mask, labels = data.batch(data.by_length()[-batch_size:])
    model.train()
    peak = memory.peak_bytes(lambda: cross_entropy(model(ids, mask), labels).backward(), torch.device("cpu"))
    model.zero_grad()
    return peak
