"""The operations by Triton kernels, for NVIDIA GPUs from sm_80 on; float32, float16 and bfloat16.

Every sum has a fixed order, so the same inputs give the same bits.
"""

from __future__ import annotations

from types import SimpleNamespace

from ..plan import KernelOperations, Kernels
from .contract import SPLITS_TOKENS, contract, tile_of_contract
from .fold import fold
from .launch import named
from .row import row_backward, row_forward
from .thin import thin_product, thin_transposed

_launchers = SimpleNamespace(
    **{
        launcher.__name__: named(launcher)
        for launcher in (thin_product, thin_transposed, row_forward, row_backward, fold, contract)
    },
    tile_of_contract=tile_of_contract,
    SPLITS_TOKENS=SPLITS_TOKENS,
)
kernels = Kernels(_launchers)
_operations = KernelOperations(kernels)
column, column_backward = _operations.column, _operations.column_backward
row, row_backward = _operations.row, _operations.row_backward
linear, linear_backward = _operations.linear, _operations.linear_backward
