"""Which linear layers can be adapted, and why others cannot."""

from __future__ import annotations

from torch import nn

from .checks import check_bias, check_frozen_weight, is_sharded
from .frozen_weight import blocks_gradients, is_kind_of_layer, kind_name, kind_of, without_dense
from .instance_forward import check_instance_forward
from .sharing.source import is_tensor_subclass


def check_adaptable(linear: nn.Module) -> None:
    """Raise unless `linear` is a plain `nn.Linear` or transformers `Conv1D` with a usable weight, or quantised.

    Whether a quantised weight can be made dense is not tried yet.
    """
    if any(map(is_sharded, linear.parameters(recurse=False))):
        raise TypeError(
            "its weight is sharded: under FSDP2 call apply_genft or load_adapter before fully_shard; a layer under "
            "tensor parallelism (parallelize_module) cannot be adapted"
        )
    if is_kind_of_layer(linear):
        _check_quantised(linear)
        return
    if (method := without_dense(linear)) is not None:
        raise TypeError(
            f"{type(linear).__name__} cannot be adapted: {method} keeps W in a form of its kernels that is never made "
            "dense (if you can, register_frozen_weight)"
        )
    # A subclass with a forward of its own, or one whose owner reads the weight past forward, would bypass the update.
    # Falcon's has that of nn.Linear, written out.
    computes = type(linear).forward is nn.Linear.forward or type(linear).__name__ == "FalconLinear"
    plain = isinstance(linear, nn.Linear) and computes
    if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear) or not (plain or is_conv1d(linear)):
        of_torch = type(linear).__module__.startswith("torch.")
        kind = type(linear).__name__ if of_torch else f"{type(linear).__module__}.{type(linear).__name__}"
        other = "; merge and unload the other adapter first" if kind.startswith("peft.") else ""
        raise TypeError(f"{kind} cannot be adapted: only nn.Linear and transformers' Conv1D can{other}")
    if (weight := linear._parameters.get("weight")) is None:
        raise TypeError("its weight is not a parameter but computed (by a parametrization, weight or spectral norm)")
    if kind_of(linear) is not None:
        _check_quantised(linear)
        return
    if is_tensor_subclass(weight) and not type(weight).__module__.startswith("torch."):
        raise TypeError(
            f"{kind_name(linear)} cannot be adapted: how its weight becomes a dense matrix is not known "
            "(register_frozen_weight)"
        )
    check_instance_forward(linear)
    check_frozen_weight(weight.detach())
    check_bias(linear.bias, weight.shape[0 if isinstance(linear, nn.Linear) else 1])  # type: ignore[arg-type]


def _check_quantised(linear: nn.Module) -> None:
    if (reason := blocks_gradients(linear)) is not None:
        raise TypeError(f"{kind_name(linear)} cannot be adapted: {reason}")
    check_instance_forward(linear)


def check_not_wrapped(model: nn.Module) -> None:
    """TypeError if `torch.compile` has wrapped a whole model: what is set on the wrapper goes to the model inside."""
    if type(model).__name__ == "OptimizedModule":
        raise TypeError(
            "torch.compile has wrapped the model: adapt the model first and compile it then, or pass model._orig_mod"
        )


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D (weight [in, out]), told without importing transformers."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
