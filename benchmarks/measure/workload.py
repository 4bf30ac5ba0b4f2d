"""The parts that a provider hands to the harness: a forward, its backward, and the tensors that get gradients."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

# The plain PyTorch formula of a provider: from its leaves, in whatever dtype, to its outputs.
Formula = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]


@dataclasses.dataclass
class Workload:
    """A call that autograd differentiates.

    Args:
        function: from nothing to the outputs; it reads `leaves`.
        leaves: what gets a gradient, by name.
        grads: the gradient of each output.
        formula: what the outputs must be.
        same_as: workloads of one problem with equal `same_as` have the same formula on the same leaves.
        frozen: tensors that are there anyway, and so are no cost of keeping: the weight.
        projections: how many layers one call computes; time and memory are reported for one of them.
        checked: what the gate runs in place of this one, where that alone can be compared.
        own_backward: gradients without autograd, for products alone, into memory that is there already.
    """

    function: Callable[[], Tensor | tuple[Tensor, ...]]
    leaves: dict[str, Tensor]
    grads: tuple[Tensor, ...]
    formula: Formula
    same_as: tuple[str | int, ...]
    frozen: tuple[Tensor, ...] = ()
    projections: int = 1
    checked: "Workload | None" = None
    own_backward: Callable[[], tuple[Tensor, ...]] | None = None

    def forward(self) -> tuple[Tensor, ...]:
        """The outputs, with their graph."""
        outputs = self.function()
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def backward(self, outputs: tuple[Tensor, ...], retain: bool = False) -> tuple[Tensor, ...]:
        """The gradient of every leaf; with `retain` it can be asked for again."""
        if self.own_backward is not None:
            return self.own_backward()
        return torch.autograd.grad(outputs, list(self.leaves.values()), self.grads, retain_graph=retain)

    def call(self, direction: str) -> Callable[[], object]:
        """One call of "forward", "backward" or "both"; for the backward alone, again and again after one forward."""
        if direction == "forward":
            return self.forward
        if direction == "both":
            return lambda: self.backward(self.forward())
        outputs = self.forward()
        return lambda: self.backward(outputs, retain=True)

    def results(self) -> dict[str, Tensor]:
        """Outputs and gradients by name, of the workload that the gate looks at."""
        if self.checked is not None:
            return self.checked.results()
        outputs = self.forward()
        return named(outputs, self.backward(outputs), self.leaves)


def named(outputs: tuple[Tensor, ...], grads: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """`y` (`y0`, `y1`, ... where there are several) and `d<leaf>`."""
    names = ["y"] if len(outputs) == 1 else [f"y{index}" for index in range(len(outputs))]
    results = dict(zip(names, (output.detach() for output in outputs), strict=True))
    return results | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
