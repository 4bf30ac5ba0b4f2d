"""One training run: the same budget, batches and schedule whatever the method."""

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from benchmarks.measure import memory
from benchmarks.measure.rows import Row

from .methods import METHODS, optimizer_groups, settings_of, trainable_parameters
from .metrics import METRICS, PERPLEXITY
from .recipe import Recipe
from .tasks.problem import NO_LABEL, Problem, by_length

CPU = torch.device("cpu")


class Diverged(Exception):
    """A gradient was not finite."""


class Setting(NamedTuple):
    """The settings that a sweep chooses."""

    rate: float
    scale: float = 1.0  # times the update's own factor (GenFT's scaling, LoRA's alpha)
    head_rate: float | None = None  # None is `rate`

    def __str__(self) -> str:
        head = "" if self.head_rate is None else f", head {self.head_rate:g}"
        return f"{self.rate:g}{head}" + ("" if self.scale == 1 else f", scale × {self.scale:g}")


@dataclass(frozen=True)
class Job:
    """A method to train, the number of parameters that it may train beside the head, and how."""

    method: str
    size: int
    setting: Setting
    seed: int
    recipe: Recipe = field(default_factory=Recipe)

    def __str__(self) -> str:
        return f"{self.method}, {self.size:,} parameters, rate {self.setting}, seed {self.seed}"

    def model(self, problem: Problem) -> nn.Module:
        """A fresh model, adapted; the seed fixes every initial value."""
        torch.manual_seed(self.seed)
        return METHODS[self.method].adapt(problem.model(), problem, self.size, self.setting.scale)


def train(model: nn.Module, problem: Problem, job: Job) -> Row:
    """Train `model` in place and evaluate after every epoch; no epoch is picked afterwards.

    Returns:
        The adapter's settings, the number of test examples, score and loss on them after each epoch, the median of what
        a step takes of the processor, of all threads together, so that other work on the machine counts little, and the
        peak memory of one forward and backward more, over the longest examples.
    """
    recipe = job.recipe
    batches = recipe.batches(problem.train.lengths, job.seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = optimizer_groups(model, problem.places.head, job.setting.rate, job.setting.head_rate, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: recipe.factor(step, len(batches)))
    row: Row = {"trainable": trainable_parameters(model), "settings": settings_of(model), "tested": len(problem.test)}
    row |= {"score": [], "loss": []}
    torch.manual_seed(job.seed)  # the methods drew different numbers for their initial values
    seconds = []

    def gradients(rows: list[int]) -> None:
        model.train()
        inputs, labels = problem.train.batch(rows)
        loss_of(model(*inputs), labels).backward()

    for step, rows in enumerate(batches, start=1):
        started = time.process_time()
        gradients(rows)
        if not nn.utils.clip_grad_norm_(parameters, recipe.clip_norm).isfinite():
            raise Diverged(f"{job} diverged at step {step} of {len(batches)}")
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - started)
        if step % (len(batches) // recipe.epochs) == 0:
            score, loss = evaluate(model, problem)
            row["score"].append(score)
            row["loss"].append(loss)
            print(
                f"{job}: step {step} of {len(batches)}, {sum(seconds):.0f} s, {problem.metric} {score:.3f}", flush=True
            )
    row["step_cpu_ms"] = round(1e3 * statistics.median(seconds), 3)
    longest = by_length(problem.train)[-recipe.batch_size :]
    return row | {"peak_bytes": memory.peak_bytes(lambda: gradients(longest), CPU)}


def loss_of(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of classes or of next tokens; the squared error where labels are numbers."""
    if labels.is_floating_point():
        return mse_loss(logits.squeeze(-1), labels, reduction=reduction)
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(model: nn.Module, problem: Problem) -> tuple[float, float]:
    """The metric and the mean loss on the part to judge by, examples of like length together."""
    model.eval()
    order = by_length(problem.test)
    predicted, expected, total, count = [], [], 0.0, 0
    for start in range(0, len(order), problem.evaluation_batch):
        inputs, labels = problem.test.batch(order[start : start + problem.evaluation_batch])
        logits = model(*inputs)
        total += loss_of(logits, labels, "sum").item()
        count += int((labels != NO_LABEL).sum())
        if problem.metric != PERPLEXITY:  # its predictions would fill the memory
            predicted.append(logits.squeeze(-1) if labels.is_floating_point() else logits.argmax(-1))
            expected.append(labels)
    loss = total / count
    if problem.metric == PERPLEXITY:
        return math.exp(loss), loss
    return METRICS[problem.metric](torch.cat(predicted), torch.cat(expected)), loss
