"""The frozen weights of torchao, tensors of classes of its own, which genft_kernels/frozen_weight.py looks up."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..frozen_weight import Kind

# Where a weight keeps how its layer's inputs are quantised.
_OF_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization", "input_quant_func")


def _dense(module: Any) -> Tensor:
    return module.weight.dequantize()


def _dense_nf4(module: Any) -> Tensor:
    return module.weight.get_original_weight()


def _quantises_inputs(module: Any) -> str | None:
    if all(getattr(module.weight, name, None) is None for name in _OF_ACTIVATIONS):
        return None
    return (
        "it quantises its inputs, too (dynamic activations), and has no gradient for the layers below it: quantise "
        "weights only"
    )


KINDS = {
    "torchao.quantization.quantize_.workflows.nf4.nf4_tensor.NF4Tensor": Kind(_dense_nf4),
    "torchao.utils.TorchAOBaseTensor": Kind(_dense, blocks_gradients=_quantises_inputs),
}
