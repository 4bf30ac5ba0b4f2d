"""One training run: the same budget, batches and schedule whatever the method."""

import hashlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from .encoder import Encoded, fresh_classifier
from .errors import DemoError
from .memory import peak_tensor_bytes
from .methods import METHODS, trainable_parameters

EVALUATION_BATCH = 128


class Diverged(DemoError):
    """A gradient was not finite."""


@dataclass(frozen=True)
class Budget:
    """What every method may spend. The rate rises linearly over the warm-up and falls linearly to zero."""

    epochs: int = 3
    batch_size: int = 32
    warmup_share: float = 0.1
    clip_norm: float = 1.0


@dataclass
class Run:
    """What one method did with one seed."""

    method: str
    seed: int
    rate: float
    trainable: int
    settings: dict
    batches_sha256: str
    losses: list[float] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)  # step, accuracy, loss; one per epoch
    step_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def accuracy(self) -> float:
        """Accuracy after the last epoch: no epoch is picked afterwards."""
        return self.evaluations[-1]["accuracy"]

    @property
    def median_step_seconds(self) -> float:
        return statistics.median(self.step_seconds)


def batch_order(examples: int, budget: Budget, seed: int) -> list[list[int]]:
    """The rows of every batch of the whole run: a fresh permutation each epoch."""
    generator = torch.Generator().manual_seed(seed)
    order = []
    for _ in range(budget.epochs):
        rows = torch.randperm(examples, generator=generator).tolist()
        order += [rows[start : start + budget.batch_size] for start in range(0, examples, budget.batch_size)]
    return order


def rate_factor(step: int, steps: int, warmup_share: float) -> float:
    """What the rate is multiplied by at ``step`` of ``steps``."""
    warmup = max(1, round(steps * warmup_share))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup), 1.0)


def prepare(encoder: nn.Module, labels: int, method: str, seed: int) -> nn.Module:
    """A fresh copy of the encoder with a head, adapted by ``method``; ``seed`` fixes every initial value."""
    torch.manual_seed(seed)
    return METHODS[method].adapt(fresh_classifier(encoder, labels))


def train(
    model: nn.Module,
    train_set: Encoded,
    test_set: Encoded,
    *,
    method: str,
    rate: float,
    seed: int,
    budget: Budget,
    on_step: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Train ``model`` in place; evaluate after every epoch; measure the memory of one more, unused step."""
    order = batch_order(len(train_set), budget, seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, len(order), budget.warmup_share)
    )
    digest = hashlib.sha256(repr(order).encode()).hexdigest()
    run = Run(method, seed, rate, trainable_parameters(model), adapter_settings(model), digest)
    torch.manual_seed(seed)  # the methods drew different numbers for their initial values
    batches_per_epoch = len(order) // budget.epochs
    for step, rows in enumerate(order, start=1):
        model.train()
        started = time.perf_counter()
        ids, mask, labels = train_set.batch(rows)
        loss = cross_entropy(model(ids, mask), labels)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, budget.clip_norm)
        if not norm.isfinite():
            raise Diverged(f"{method} with rate {rate:g} diverged at step {step} of {len(order)}")
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.step_seconds.append(time.perf_counter() - started)
        run.losses.append(loss.item())
        if step % batches_per_epoch == 0:
            run.evaluations.append({"step": step, **evaluate(model, test_set)})
        on_step(run)
    run.peak_bytes = training_step_bytes(model, train_set, budget)
    return run


@torch.no_grad()
def logits_of(model: nn.Module, data: Encoded) -> torch.Tensor:
    """Logits [examples, labels] in evaluation mode, in the order of ``data``."""
    model.eval()
    rows = data.by_length()
    parts = [rows[start : start + EVALUATION_BATCH] for start in range(0, len(rows), EVALUATION_BATCH)]
    outputs = torch.cat([model(*data.batch(part)[:2]) for part in parts])
    return torch.empty_like(outputs).index_copy_(0, torch.tensor(rows), outputs)


def evaluate(model: nn.Module, data: Encoded) -> dict:
    """Accuracy and mean loss."""
    logits = logits_of(model, data)
    hits = (logits.argmax(-1) == data.labels).sum().item()
    return {"accuracy": hits / len(data), "loss": cross_entropy(logits, data.labels).item()}


def training_step_bytes(model: nn.Module, data: Encoded, budget: Budget) -> int:
    """Peak tensor memory of one forward and backward over the longest texts, beyond weights and optimizer."""
    ids, mask, labels = data.batch(data.by_length()[-budget.batch_size :])
    model.train()
    peak = peak_tensor_bytes(lambda: cross_entropy(model(ids, mask), labels).backward())
    model.zero_grad()
    return peak


def adapter_settings(model: nn.Module) -> dict:
    """The configuration that the method put on the model, for the record."""
    if hasattr(model, "peft_config"):
        config = model.peft_config["default"]
        return {"r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    config = getattr(model, "genft_config", None)
    return config.to_dict() if config is not None else {}
