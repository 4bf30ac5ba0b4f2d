"""Measured choice of the software pipeline's depth, kept on disk by Triton (`triton.autotune`, its cache folder).

It leaves the order of every sum alone, so the outcome of a measurement never shows in a result. Where nothing can be
measured, the first depth is taken.
"""

from __future__ import annotations

import triton
from torch import Tensor

_STAGES = (3, 4, 2)


def tuned(*key: str):
    """Decorate a kernel whose `num_stages` is measured anew for the values of the arguments in `key` and each dtype.

    float32 takes the first depth: its products run without matrix instructions, and a deeper pipeline only spills.
    """
    # num_warps is the launch's to give; None leaves it out here.
    configs = [triton.Config({}, num_warps=None, num_stages=stages) for stages in _STAGES]
    if triton.knobs.runtime.interpret:
        configs = configs[:1]
    return triton.autotune(configs, list(key), {"early_config_prune": _first_in_float32}, cache_results=True)


def bucket(rows: int) -> int:
    """Rows rounded up to a power of two: what a choice is made for, so that few lengths of a batch need measuring."""
    return triton.next_power_of_2(max(rows, 1))


def _first_in_float32(configs: list[triton.Config], arguments: dict, **_) -> list[triton.Config]:
    tensors = (value for value in arguments.values() if isinstance(value, Tensor))
    return configs[:1] if next(tensors).dtype.itemsize > 2 else configs
