"""Measured choice of the software pipeline's depth: once for each kind of launch in a process.

It leaves the order of every sum alone, so the outcome of a measurement never shows in a result.
"""

from __future__ import annotations

import threading

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import KernelInterface

STAGES = (3, 4, 2)  # the usual first
_SMALL = 1 << 20  # elements of the largest operand, below which no depth matters


class Tuned(KernelInterface):
    """A kernel whose `num_stages` is measured for each value of the arguments in `key`, each dtype and each device.

    float32 takes the usual depth: its products run without matrix instructions, and a deeper pipeline only spills. So
    do small operands, and Triton's interpreter. While a graph is captured nothing can be measured, and nothing is kept.
    """

    def __init__(self, kernel: KernelInterface, key: tuple[str, ...]) -> None:
        self.kernel, self.stages = kernel, STAGES
        self._key = [(kernel.arg_names.index(name), name) for name in key]
        self._depths: dict[tuple, int] = {}
        self._lock = threading.Lock()  # a backward has a thread for each GPU

    def run(self, *args, **kwargs):
        values = (args[place] if place < len(args) else kwargs[name] for place, name in self._key)
        key = (args[0].dtype, args[0].device, *values)
        depth = self._depths.get(key)
        if depth is None:
            with self._lock:
                depth = self._depths.get(key) or self._chosen(key, args, kwargs)
        try:
            return self.kernel.run(*args, num_stages=depth, **kwargs)
        except OutOfResources:  # a wide k, on a card with little shared memory
            self._depths[key] = min(self.stages)
            return self.kernel.run(*args, num_stages=min(self.stages), **kwargs)

    def _chosen(self, key: tuple, args: tuple, kwargs: dict) -> int:
        usual = self.stages[0]
        if worth_measuring(args):
            if torch.cuda.is_current_stream_capturing():
                return usual
            usual = self._measured(args, kwargs)
        self._depths[key] = usual
        return usual

    def _measured(self, args: tuple, kwargs: dict) -> int:
        times = {}
        for depth in self.stages:
            try:
                times[depth] = triton.testing.do_bench(
                    lambda depth=depth: self.kernel.run(*args, num_stages=depth, **kwargs),
                    warmup=5, rep=20, return_mode="median",
                )  # fmt: skip
            except (OutOfResources, torch.OutOfMemoryError):  # this depth, or what it takes to measure it
                continue
        return min(times, key=times.get, default=self.stages[0])


def tuned(*key: str):
    """Decorate a kernel to be `Tuned` by the arguments that `key` names."""
    return lambda kernel: Tuned(kernel, key)


def worth_measuring(arguments: tuple) -> bool:
    """Whether the pipeline's depth can matter."""
    if triton.knobs.runtime.interpret:
        return False
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    return tensors[0].dtype.itemsize == 2 and max(tensor.numel() for tensor in tensors) >= _SMALL


def bucket(rows: int) -> int:
    """Rows rounded up to a power of two: what a choice is made for, so that few lengths of a batch need measuring."""
    return triton.next_power_of_2(max(rows, 1))
