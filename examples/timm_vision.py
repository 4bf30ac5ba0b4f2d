"""A vision transformer of timm: q and v of its fused qkv and the new head, as `apply_genft` finds them by itself.

The weights are random, so that nothing is downloaded; pretrained=True fetches them, and the rest stays.
"""

import timm
import torch
import torch.nn.functional as F

from genft_kernels import GenFTConfig, apply_genft, parameter_groups, trainable_summary

torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10, img_size=64, depth=4)
apply_genft(model, GenFTConfig.preset("fast", modules_to_save="head"))  # fused_blocks={"qkv": (3, (0, 2))}
print(model.blocks[0].attn.qkv)
print(trainable_summary(model))

images, labels = torch.randn(16, 3, 64, 64), torch.randint(10, (16,))
optimizer = torch.optim.AdamW(parameter_groups(model, 4e-3, head_lr=1e-2))
losses = []
for _ in range(15):
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
rows = model.blocks[0].attn.qkv.delta_weight().square().sum(1).chunk(3)
q, k, v = (block.sum().sqrt().item() for block in rows)
print(f"size of the update: q {q:.3f}, k {k:.3f}, v {v:.3f}")
