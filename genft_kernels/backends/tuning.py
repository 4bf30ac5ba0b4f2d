"""How `linear` runs by kernels: by shape, from what was measured on each kind of card (docs/method.md#kernels)."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Choices(NamedTuple):
    """Where one way of running `linear` gives place to another.

    Tiled form: up to `main_loop_tokens` W is read once and the update's tile made on the way; beyond, it is folded
    into W for a vendor GEMM. Factored form: extended K, but folded from `fold_tokens` tokens and `fold_work` = T in out
    multiplications on.
    """

    main_loop_tokens: int
    fold_tokens: int
    fold_work: int

    def folds(self, tokens: int, weight: torch.Tensor) -> bool:
        """Whether the factored form folds for `tokens` tokens."""
        return tokens >= self.fold_tokens and tokens * weight.numel() >= self.fold_work


# By compute capability. A card that is not listed takes what counting says: a fold moves W three times, in the time of
# about 1,000 tokens' product, and a small one costs the launch; a vendor GEMM saves about a third of a product.
MEASURED: dict[tuple[int, int], Choices] = {}
COUNTED = Choices(main_loop_tokens=128, fold_tokens=1024, fold_work=2**32)


def choices_for(device: torch.device) -> Choices:
    """The choices for a device; no card is refused."""
    if device.type != "cuda":
        return COUNTED
    return MEASURED.get(torch.cuda.get_device_capability(device), COUNTED)
