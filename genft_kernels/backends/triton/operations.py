"""The operations by Triton kernels, for NVIDIA GPUs from sm_80 on; float32, float16 and bfloat16.

Every sum has a fixed order, so the same inputs give the same bits.
"""

from __future__ import annotations

from types import SimpleNamespace

from ..plan import KernelOperations
from .contract import contract
from .fold import fold
from .row import row_backward as _tiled_row_backward
from .row import row_forward as _tiled_row_forward
from .thin import thin_product, thin_transposed

kernels = SimpleNamespace(
    thin_product=thin_product,
    thin_transposed=thin_transposed,
    row_forward=_tiled_row_forward,
    row_backward=_tiled_row_backward,
    fold=fold,
    contract=contract,
)
_operations = KernelOperations(kernels)
column, column_backward = _operations.column, _operations.column_backward
row, row_backward = _operations.row, _operations.row_backward
linear, linear_backward = _operations.linear, _operations.linear_backward
