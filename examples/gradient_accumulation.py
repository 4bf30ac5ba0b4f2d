"""Gradient accumulation: the update is generated once for all micro-batches of an optimizer step.

The transformers `Trainer` does the same with callbacks=[AccumulateCallback()].
"""

import torch
from torch import nn

from genft_kernels import GenFTConfig, accumulate, apply_genft, parameter_groups

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
apply_genft(model, GenFTConfig.preset("fast", target_modules=["0", "2", "4"]))
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2))
inputs, targets = torch.randn(64, 64), torch.randn(64, 64)


def backward_of_all(micro_batches: int = 8) -> None:
    for x, y in zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True):
        (((model(x) - y).square().mean()) / micro_batches).backward()


backward_of_all()  # each micro-batch generates, and has a backward of the generator
expected = [p.grad.clone() for p in trained]
optimizer.zero_grad()

losses = []
for step in range(20):
    with accumulate(model):  # one generation and one backward of it
        backward_of_all()
    if step == 0:
        difference = max((p.grad - grad).abs().max().item() for p, grad in zip(trained, expected, strict=True))
        print(f"gradients differ by {difference:.1e} at most")
    torch.nn.utils.clip_grad_norm_(trained, 1.0)  # after the block: its end brings the gradients
    optimizer.step()
    optimizer.zero_grad()
    losses.append((model(inputs) - targets).square().mean().item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
