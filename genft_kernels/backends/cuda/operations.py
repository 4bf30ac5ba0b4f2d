"""The operations by the CUDA C++ kernels of `csrc/`, for NVIDIA GPUs from sm_80 on; float32, float16 and bfloat16."""

from __future__ import annotations

import torch

from ..plan import KernelOperations
from . import extension, kernels

_operations = KernelOperations(kernels)
column, column_backward = _operations.column, _operations.column_backward
row, row_backward = _operations.row, _operations.row_backward
linear, linear_backward = _operations.linear, _operations.linear_backward


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute in `dtype` on `device`, or None if they can; compiles nothing."""
    if dtype not in kernels.DTYPES:
        return f"it does not compute in {dtype}"
    return _device_reason(device)


def _device_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs sm_80 or newer, and {device} is sm_{capability[0]}{capability[1]}"
    return extension.unavailable_reason()
