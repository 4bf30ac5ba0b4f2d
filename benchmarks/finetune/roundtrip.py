"""Carry a trained GenFT adapter through a file into a fresh model, merge and unmerge, comparing logits."""

from pathlib import Path

import torch
from torch import Tensor, nn

import genft_kernels

from .encoder import Encoded
from .training import logits_of

# Merging rounds W + delta to float32 once more: a few units in the last place of W, seen through six layers.
MERGE_TOLERANCE = 2e-5


def check_adapter(trained: nn.Module, fresh: nn.Module, data: Encoded, folder: Path) -> dict[str, bool]:
    """Save the adapter of `trained`, load it into `fresh` (unadapted, with another head) and compare.

    Returns:
        Each comparison in words, and whether it came out as it must.
    """
    expected, untrained = logits_of(trained, data), logits_of(fresh, data)
    genft_kernels.save_adapter(trained, folder)
    genft_kernels.load_adapter(fresh, folder)
    loaded = logits_of(fresh, data)
    genft_kernels.merge(fresh)
    merged = logits_of(fresh, data)
    genft_kernels.unmerge(fresh)
    unmerged = logits_of(fresh, data)

    def apart(logits: Tensor) -> float:
        return ((logits - expected).abs().max() / expected.abs().max()).item()

    flips = (merged.argmax(-1) != expected.argmax(-1)).sum().item()
    gap = f"{apart(merged):.1e} of the largest logit, at most {MERGE_TOLERANCE:g}; {flips} answers differ"
    return {
        f"before loading, the fresh model answers otherwise ({apart(untrained):.2f})": apart(untrained) > 0.1,
        "adapter saved and loaded: logits equal bit for bit": torch.equal(loaded, expected),
        f"merged: logits equal but for rounding ({gap})": apart(merged) <= MERGE_TOLERANCE,
        "unmerged: logits equal bit for bit again": torch.equal(unmerged, expected),
    }
