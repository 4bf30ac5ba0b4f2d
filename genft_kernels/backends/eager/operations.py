"""The operations in plain PyTorch: the planned algebra of docs/method.md#two-products, on any device.

An update, or a gradient of its size, exists only as transient tiles of rows [tile, in] in the weight's
orientation; nothing of that size is returned or kept. The one transient of a whole weight's size is the folded
W + scale * dW that feeds a matrix product. A result that is not wanted is None.
"""

from __future__ import annotations

from .linear import linear, linear_backward
from .row import row, row_backward
from .thin import column, column_backward

__all__ = ["column", "column_backward", "linear", "linear_backward", "row", "row_backward"]
