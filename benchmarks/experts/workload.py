"""The block as a workload: the call that is timed, and the plain formula that the gate holds it to."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.experts.methods import Method, Shape
from benchmarks.measure.workload import Workload
from benchmarks.step.methods import trained


def of_block(method: Method, block: nn.Module, shape: Shape) -> Workload:
    """Forward and backward of a block that `method` has built; x [1, T, d] has a gradient, too."""
    router = block.mlp.gate.weight
    generator = torch.Generator().manual_seed(2)
    x, slope = (torch.randn(1, shape.tokens, shape.hidden, generator=generator).to(router.dtype) for _ in range(2))
    with torch.no_grad():
        chosen = block.mlp.gate(x)[2]  # [T, chosen], the same in every dtype

    def formula(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        x, *own = leaves.values()
        plain = _Plain(copy.deepcopy(block).to(x.dtype), method)
        return (functional_call(plain, dict(zip(names, own, strict=True)), (x[0], chosen))[None],)

    leaves = trained(block)
    names = [f"block.{name}" for name in leaves]
    frozen = tuple(parameter for parameter in block.parameters() if not parameter.requires_grad)
    x.requires_grad_()
    return Workload(lambda: block(x), {"x": x} | leaves, (slope,), formula, (method.name,), frozen)


class _Plain(nn.Module):
    """An adapted block in plain PyTorch: every expert with its matrices W + dW."""

    def __init__(self, block: nn.Module, method: Method) -> None:
        super().__init__()
        self.block, self.method = block, method

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """y [T, d] of x [T, d] and each token's experts [T, chosen]."""
        weights = self.method.weights(self.block)
        shares = F.linear(x, self.block.mlp.gate.weight).softmax(-1).gather(1, chosen)
        shares = shares / shares.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for expert, (gate_up, down) in enumerate(zip(weights["gate_up_proj"], weights["down_proj"], strict=True)):
            token, place = torch.where(chosen == expert)
            gate, up = F.linear(x[token], gate_up).chunk(2, -1)
            y = y.index_add(0, token, shares[token, place, None] * F.linear(F.silu(gate) * up, down))
        return y
