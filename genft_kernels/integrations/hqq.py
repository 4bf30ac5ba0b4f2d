"""The frozen weights of HQQ (`HQQLinear`), which genft_kernels/frozen_weight.py looks up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..frozen_weight import Kind


def _dense(module: Any) -> Tensor:
    if not module.is_initialized():
        raise ValueError("it holds no weight yet")
    return module.dequantize()


def _packed(module: Any) -> list[Tensor]:
    of_meta = (module.meta or {}).items()
    scales = [value for _, value in sorted(of_meta, key=lambda item: item[0]) if isinstance(value, torch.Tensor)]
    return [module.W_q, *scales]


KINDS = {"hqq.core.quantize.HQQLinear": Kind(_dense, _packed)}
