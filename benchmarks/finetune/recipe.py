"""How long a run is, in which batches, and on what schedule."""

import math
from dataclasses import dataclass

import torch

WINDOW = 8  # batches that are sorted by length together, which halves the padding of questions


@dataclass(frozen=True)
class Recipe:
    """How long, and on what schedule."""

    epochs: int = 3
    batch_size: int = 32
    schedule: str = "linear"  # or "cosine"
    warmup: float = 0.1  # share of all steps
    weight_decay: float = 0.0
    lowest: float = 0.0  # share of the rate at the end
    clip_norm: float = 1.0

    def batches(self, lengths: list[int], seed: int) -> list[list[int]]:
        """The rows of every batch of the whole run: a fresh permutation each epoch, like lengths together."""
        generator = torch.Generator().manual_seed(seed)
        order = []
        for _ in range(self.epochs):
            rows = torch.randperm(len(lengths), generator=generator)
            for window in rows.split(WINDOW * self.batch_size):
                alike = sorted(window.tolist(), key=lengths.__getitem__)
                batches = [alike[start : start + self.batch_size] for start in range(0, len(alike), self.batch_size)]
                order += [batches[each] for each in torch.randperm(len(batches), generator=generator)]
        return order

    def factor(self, step: int, steps: int) -> float:
        """The factor of a rate at `step` of `steps`: linearly up over the warm-up, then down."""
        warmup = max(1, round(steps * self.warmup))
        left = min(1.0, (steps - step) / max(1, steps - warmup))
        if self.schedule == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return min((step + 1) / warmup, self.lowest + (1 - self.lowest) * left)
