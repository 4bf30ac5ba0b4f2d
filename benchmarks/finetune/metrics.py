"""How predictions are judged: each takes predictions and labels and returns a number, larger is better."""

from collections.abc import Callable

import torch
from torch import Tensor

Metric = Callable[[Tensor, Tensor], float]
PERPLEXITY = "perplexity"  # of the mean loss; the only one where smaller is better


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The share of labels that were predicted."""
    return (predicted == labels).double().mean().item()


def correlation(predicted: Tensor, labels: Tensor) -> float:
    """Pearson's; 0 where one side is constant. Of two classes it is Matthews's."""
    pair = torch.stack([predicted.double(), labels.double()])
    pair = pair - pair.mean(1, keepdim=True)
    norms = pair.norm(dim=1).prod().item()
    return (pair[0] @ pair[1]).item() / norms if norms else 0.0


METRICS: dict[str, Metric] = {"accuracy": accuracy, "matthews": correlation, "pearson": correlation}
