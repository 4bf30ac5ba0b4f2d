"""One training run: the same budget, batches and schedule whatever the method."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.measure import memory
from benchmarks.measure.rows import Row

from .encoder import Encoded, TextClassifier
from .methods import METHODS, optimizer_groups, settings_of, trainable_parameters

EVALUATION_BATCH = 128
WARMUP_SHARE, CLIP_NORM = 0.1, 1.0
CPU = torch.device("cpu")


class Diverged(Exception):
    """A gradient was not finite."""


@dataclass(frozen=True)
class Job:
    """What is trained, and on which budget, the same for every method."""

    method: str
    rate: float
    seed: int
    epochs: int = 3
    batch_size: int = 32
    head_rate: float | None = None  # None is `rate`
    shared_lr_factor: float | None = None  # of GenFT's shared units; None is the package's

    def __str__(self) -> str:
        head = "" if self.head_rate is None else f", head at {self.head_rate:g}"
        return f"{self.method}, rate {self.rate:g}{head}, seed {self.seed}"

    def batches(self, examples: int) -> list[list[int]]:
        """The rows of every batch of the whole run: a fresh permutation each epoch."""
        generator = torch.Generator().manual_seed(self.seed)
        order = []
        for _ in range(self.epochs):
            order += torch.randperm(examples, generator=generator).split(self.batch_size)
        return [rows.tolist() for rows in order]

    def model(self, encoder: nn.Module, labels: int) -> nn.Module:
        """A fresh copy of the encoder with a head, adapted; the seed fixes every initial value."""
        torch.manual_seed(self.seed)
        _, adapt = METHODS[self.method]
        return adapt(TextClassifier(encoder, labels))


def rate_factor(step: int, steps: int) -> float:
    """What the rate is multiplied by at `step` of `steps`: up over the warm-up, then down to zero, both linearly."""
    warmup = max(1, round(steps * WARMUP_SHARE))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup), 1.0)


def train(model: nn.Module, train_set: Encoded, test_set: Encoded, job: Job) -> Row:
    """Train `model` in place and evaluate after every epoch; no epoch is picked afterwards.

    Returns:
        The adapter's settings, the number of test examples, accuracy and loss on them after each epoch, the median of
        a step's time, and the peak memory of one forward and backward more, over the longest texts.
    """
    batches = job.batches(len(train_set))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = optimizer_groups(model, job.rate, job.head_rate, job.shared_lr_factor)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, len(batches)))
    row = {"trainable": trainable_parameters(model), "settings": settings_of(model), "tested": len(test_set)}
    row |= {"accuracy": [], "loss": []}
    torch.manual_seed(job.seed)  # the methods drew different numbers for their initial values
    seconds = []

    def gradients(rows: list[int]) -> None:
        model.train()
        ids, mask, labels = train_set.batch(rows)
        cross_entropy(model(ids, mask), labels).backward()

    for step, rows in enumerate(batches, start=1):
        started = time.perf_counter()
        gradients(rows)
        if not nn.utils.clip_grad_norm_(parameters, CLIP_NORM).isfinite():
            raise Diverged(f"{job} diverged at step {step} of {len(batches)}")
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        if step % (len(batches) // job.epochs) == 0:
            accuracy, loss = evaluate(model, test_set)
            row["accuracy"].append(accuracy)
            row["loss"].append(loss)
            print(f"{job}: step {step} of {len(batches)}, {sum(seconds):.0f} s, accuracy {accuracy:.3f}", flush=True)
    row["step_ms"] = round(1e3 * statistics.median(seconds), 3)
    longest = train_set.by_length()[-job.batch_size :]
    return row | {"peak_bytes": memory.peak_bytes(lambda: gradients(longest), CPU)}


@torch.no_grad()
def evaluate(model: nn.Module, data: Encoded) -> tuple[float, float]:
    """Accuracy and mean loss, texts of like length together."""
    model.eval()
    rows = torch.tensor(data.by_length())
    logits = torch.cat([model(*data.batch(part.tolist())[:2]) for part in rows.split(EVALUATION_BATCH)])
    labels = data.labels[rows]
    return (logits.argmax(-1) == labels).double().mean().item(), cross_entropy(logits, labels).item()
