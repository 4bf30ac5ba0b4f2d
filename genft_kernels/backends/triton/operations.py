"""The operations by Triton kernels, for NVIDIA GPUs from sm_80 on; float32, float16 and bfloat16.

Every sum has a fixed order, so the same inputs give the same bits.
"""

from ..plan import KernelOperations, Kernels
from . import launchers

kernels = Kernels(launchers)
_operations = KernelOperations(kernels)
column, column_backward = _operations.column, _operations.column_backward
row, row_backward = _operations.row, _operations.row_backward
linear, linear_backward = _operations.linear, _operations.linear_backward
