"""The operations by the CUDA C++ kernels of `csrc/`, for NVIDIA GPUs from sm_80 on; float32, float16 and bfloat16."""

from __future__ import annotations

from ..plan import KernelOperations, Kernels
from . import extension, launchers

kernels = Kernels(launchers)
_operations = KernelOperations(kernels)
column, column_backward = _operations.column, _operations.column_backward
row, row_backward = _operations.row, _operations.row_backward
linear, linear_backward = _operations.linear, _operations.linear_backward


def unavailable_reason() -> str | None:
    """Why the kernels cannot be had on this machine, or None if they can; compiles nothing."""
    return extension.unavailable_reason()
