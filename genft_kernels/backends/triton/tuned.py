"""Measured choice of the software pipeline's depth, kept on disk by Triton (`triton.autotune`, its cache folder).

It leaves the order of every sum alone, so the outcome of a measurement never shows in a result.
"""

from __future__ import annotations

import threading

import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import KernelInterface

STAGES = (3, 4, 2)  # the usual first
_SMALL = 1 << 20  # elements of the largest operand, below which no depth matters


class Tuned(KernelInterface):
    """A kernel whose `num_stages` is measured anew for the values of the arguments in `key` and each dtype.

    float32 takes the usual depth: its products run without matrix instructions, and a deeper pipeline only spills. So
    do small operands, and Triton's interpreter.
    """

    def __init__(self, kernel: KernelInterface, key: tuple[str, ...], stages: tuple[int, ...]) -> None:
        # num_warps is the launch's to give; None leaves it out here.
        configs = [triton.Config({}, num_warps=None, num_stages=depth) for depth in stages]
        self.kernel, self.measured = kernel, triton.autotune(configs, list(key), cache_results=True)(kernel)
        self.stages = stages
        # Triton's tuner notes a call's arguments in itself; backward has a thread for each GPU.
        self._lock = threading.Lock()

    def run(self, *args, **kwargs):
        if worth_measuring(args):
            with self._lock:
                return self.measured.run(*args, **kwargs)
        try:
            return self.kernel.run(*args, num_stages=self.stages[0], **kwargs)
        except OutOfResources:  # a wide k, on a card with little shared memory
            return self.kernel.run(*args, num_stages=min(self.stages), **kwargs)


def tuned(*key: str, stages: tuple[int, ...] = STAGES):
    """Decorate a kernel to be `Tuned` by the arguments that `key` names."""
    return lambda kernel: Tuned(kernel, key, stages)


def worth_measuring(arguments: tuple) -> bool:
    """Whether the pipeline's depth can matter."""
    if triton.knobs.runtime.interpret:
        return False
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    return tensors[0].dtype.itemsize == 2 and max(tensor.numel() for tensor in tensors) >= _SMALL


def bucket(rows: int) -> int:
    """Rows rounded up to a power of two: what a choice is made for, so that few lengths of a batch need measuring."""
    return triton.next_power_of_2(max(rows, 1))
