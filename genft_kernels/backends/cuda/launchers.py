"""The launchers of the CUDA kernels, under the names of `genft_kernels/backends/launchers.py`."""

from .contract import contract, tile_of_contract
from .fold import fold
from .row import row_backward, row_forward
from .sum import sum_parts
from .thin import thin_product, thin_transposed

__all__ = [
    "contract", "fold", "row_backward", "row_forward", "sum_parts", "thin_product", "thin_transposed",
    "tile_of_contract",
]  # fmt: skip
