"""Adapt the layers of a plain PyTorch model one by one: `GenFTLinear` in the place of `nn.Linear`, no other library.

Layers of one shape share a generator, which one of them registers; `apply_genft` does all this for a whole model.
"""

import torch
from torch import nn

from genft_kernels import GenFTConfig, GenFTGenerator, GenFTLinear


def train(model: nn.Module, targets: torch.Tensor, steps: int, rate: float) -> list[float]:
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=rate)
    losses = []
    for _ in range(steps):
        loss = (model(x) - targets).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


torch.manual_seed(0)
x = torch.linspace(-3, 3, 256)[:, None]
model = nn.Sequential(
    nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
)
print(f"pretraining on sin(x): loss {train(model, x.sin(), 200, 1e-2)[-1]:.1e}")

model.requires_grad_(False)
config = GenFTConfig.preset("fast", shared_dim=8, specific_dim=4)
generator = GenFTGenerator(64, 64, config)
model[2] = GenFTLinear.from_linear(model[2], generator)  # owns the generator, as one of its submodules
model[4] = GenFTLinear.from_linear(model[4], generator, register_generator=False)

losses = train(model, x.cos(), 200, 2e-3)
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"fine-tuning on cos(x): loss {losses[0]:.1e} -> {losses[-1]:.1e}, {trained} trained parameters")
print(f"size of the update: {model[2].delta_weight().norm() / model[2].weight.norm():.3f} of W")
