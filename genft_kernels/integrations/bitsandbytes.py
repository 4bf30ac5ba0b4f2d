"""The frozen weights of bitsandbytes (`Linear4bit`, `Linear8bitLt`), which genft_kernels/frozen_weight.py looks up."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from ..frozen_weight import Kind


def _unpacked(module: Any) -> tuple[Tensor, Any]:
    """Codes and state of a 4-bit weight, as they are everywhere but in `Linear4bit.forward` on some CPUs."""
    weight = module.weight
    # Where FSDP2 has put a plain parameter in its place the layer has the state, as for its own forward.
    data, state = weight.data, getattr(weight, "quant_state", None) or module.quant_state
    if state is None:
        raise ValueError("it is not quantised yet: move it to its device first")
    if data.dtype != (stored := getattr(weight, "quant_storage", module.quant_storage)):
        raise ValueError(
            f"its codes have been cast from {stored} to {data.dtype} (mixed precision): load it with "
            f"bnb_4bit_quant_storage={data.dtype}"
        )
    if getattr(state, "packing_format_for_cpu", False):  # an evaluation has packed it for its product
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        data, state = _convert_weight_packed_for_cpu_inverse(data, copy.copy(state))  # it changes the state
    return data, state


def _dense_4bit(module: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*_unpacked(module))


def _packed_4bit(module: Any) -> list[Tensor]:
    data, state = _unpacked(module)
    nested = [] if state.state2 is None else [state.state2.absmax, state.state2.code]
    return [data, state.absmax, state.code, *nested, *([] if state.offset is None else [state.offset])]


def _codes_and_scales(module: Any) -> tuple[Tensor, Tensor]:
    """The codes of an 8-bit weight; its first forward moves them from the weight to the module's state."""
    weight, state = module.weight, module.state
    if state.has_fp16_weights:
        raise ValueError("it keeps W in 16 bits (has_fp16_weights=True): load it with has_fp16_weights=False")
    codes = weight.data if state.CB is None else state.CB
    scales = getattr(weight, "SCB", None) if state.SCB is None else state.SCB
    if scales is None:
        raise ValueError(
            "it has no scales: it is not quantised yet (move it to its device first), or FSDP has sharded it, where "
            "bitsandbytes loses them (load it in 4 bits, or use DistributedDataParallel)"
        )
    return codes, scales


def _dense_8bit(module: Any) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    codes, scales = _codes_and_scales(module)
    return int8_vectorwise_dequant(codes, scales.to(codes.device))


def _packed_8bit(module: Any) -> list[Tensor]:
    return list(_codes_and_scales(module))


KINDS = {
    "bitsandbytes.nn.modules.Linear4bit": Kind(_dense_4bit, _packed_4bit),
    "bitsandbytes.nn.modules.Linear8bitLt": Kind(_dense_8bit, _packed_8bit),
}
