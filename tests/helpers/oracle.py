"""A tower of linear layers, and what it computes adapted: updates materialised in float64, gradients by autograd."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from genft_kernels import GeneratorParameters, GenFTLinear, reference

WIDTH = 6
SELECTIVE = functools.partial(
    create_selective_checkpoint_contexts,
    lambda context, op, *args, **kwargs: (
        CheckpointPolicy.MUST_SAVE
        if op in (torch.ops.aten.mul.Tensor, torch.ops.aten.mm.default, torch.ops.aten.tanh.default)
        else CheckpointPolicy.PREFER_RECOMPUTE
    ),
)
CHECKPOINTS = {
    "none": None,
    "reentrant": {"use_reentrant": True},
    "plain": {"use_reentrant": False},
    "selective": {"use_reentrant": False, "context_fn": SELECTIVE},
}


class Block(nn.Module):
    """Square, fused and rectangular layers, two of which read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.fused = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.fused(torch.tanh(self.query(x)) + self.value(x))))


class Tower(nn.Module):
    """Two blocks and a head; `checkpointing` is one of `CHECKPOINTS`, a route the blocks to go through, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 2)
        self.checkpointing = "none"

    def forward(self, x, route=(0, 1)):
        for block in (self.blocks[index] for index in route):
            options = CHECKPOINTS[self.checkpointing]
            x = block(x) if options is None else checkpoint(block, x, **options)
        return self.head(x)


def frozen_state(model: Tower) -> dict[str, Tensor]:
    """A copy of W and bias of every linear layer by name, before or after the model is adapted."""
    copies = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            weight = layer.frozen_weight if isinstance(layer, GenFTLinear) else layer.weight
            copies[f"{name}.weight"] = weight.detach().clone()
            if layer.bias is not None:
                copies[f"{name}.bias"] = layer.bias.detach().clone()
    return copies


class Oracle:
    """The model as `frozen`, the weights that it must have, and its present trained parameters make it, in float64.

    With `adapted=False` it is the frozen model alone.
    """

    def __init__(self, model: Tower, frozen: dict[str, Tensor], adapted: bool = True) -> None:
        self._of = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
        self._state = {name: tensor.double() for name, tensor in frozen.items()}
        if adapted:
            for name, layer in model.named_modules():
                if isinstance(layer, GenFTLinear):
                    self._state[f"{name}.weight"] = self._state[f"{name}.weight"] + self._update(model, name, layer)
            if model.head.weight.requires_grad:  # a module to save
                self._state |= {name: p for name, p in self._of.items() if name.startswith("head.")}

    def _update(self, model: Tower, name: str, layer: GenFTLinear) -> Tensor:
        count, blocks = layer.blocks
        weights = self._state[f"{name}.weight"].chunk(count)
        out_features, in_features = weights[0].shape
        shared = f"genft_generators.{in_features}x{out_features}."

        def units(field: str) -> Tensor | None:
            stage, end = field.split("_")[:2]
            names = (shared + field, f"{name}.{stage}_specific_{end}", f"{name}.specific_{end}")
            if field.endswith("bias"):
                return self._of.get(names[0])
            halves = [self._of[one] for one in names if one in self._of]
            return torch.cat(halves, 1 if end == "up" else 0) if halves else None

        transform = {"column": "row", "row": "column"}.get(layer.config.transform, "neither")
        fields = GeneratorParameters._fields
        params = GeneratorParameters(*(None if f.startswith(transform) else units(f) for f in fields))
        deltas = [
            reference.delta_weight(weight, params, layer.config) if index in blocks else torch.zeros_like(weight)
            for index, weight in enumerate(weights)
        ]
        return torch.cat(deltas)

    def output(self, x: Tensor, route: tuple[int, ...] = (0, 1)) -> Tensor:
        """The answer that the model must give to x."""
        return functional_call(_plain(), self._state, (x.double(), route))

    def backward(self, loss: Tensor, inputs: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The gradients of every parameter that trains, by name, zeros included, and of the inputs."""
        wanted = {name: p for name, p in self._of.items() if p.requires_grad}
        found = torch.autograd.grad(loss, [*wanted.values(), *inputs], materialize_grads=True)
        return dict(zip(wanted, found, strict=False)), list(found[len(wanted) :])


@functools.cache
def _plain() -> Tower:
    return Tower().double()
