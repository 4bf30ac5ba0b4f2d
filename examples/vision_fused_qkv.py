"""Adapt q and v of a vision transformer whose q, k and v are one fused weight, as in timm: `fused_blocks`.

The model is made here, tiny and untrained, with timm's names. With timm installed it would be
timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=10); the rest stays.
"""

import torch
import torch.nn.functional as F
from torch import nn

from genft_kernels import GenFTConfig, apply_genft, parameter_groups, trainable_summary


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)  # rows: all of q, all of k, all of v
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(2, 0).transpose(2, 3)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = (
            nn.LayerNorm(dim),
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)),
        )

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, dim: int = 64, depth: int = 2, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=8, stride=8)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.head = nn.Linear(dim, classes)

    def forward(self, images):
        return self.head(self.blocks(self.patch_embed(images).flatten(2).mT).mean(1))


torch.manual_seed(0)
model = VisionTransformer()
config = GenFTConfig.preset("fast", fused_blocks={"qkv": (3, (0, 2))}, modules_to_save=["head"])  # q and v, not k
apply_genft(model, config)
print(model.blocks[0].attn.qkv)
print(trainable_summary(model))

images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
optimizer = torch.optim.AdamW(parameter_groups(model, 4e-3, head_lr=1e-2))
losses = []
for _ in range(20):
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
rows = model.blocks[0].attn.qkv.delta_weight().square().sum(1).chunk(3)
q, k, v = (block.sum().sqrt().item() for block in rows)
print(f"size of the update: q {q:.3f}, k {k:.3f}, v {v:.3f}")
