"""The checks that every entry point makes of its arguments, with errors that name the culprit."""

from __future__ import annotations

from typing import Any

import torch

from . import _torch_private
from .activations import ACTIVATIONS
from .arguments import check_flag, check_type, described, is_finite, is_integer, shown
from .config import GenFTConfig, check_config
from .parameters import GeneratorParameters, expected_shapes

SUPPORTED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_sizes(**sizes: object) -> None:
    """Raise unless each of them is an integer of at least 1."""
    for name, value in sizes.items():
        if not is_integer(value):
            raise TypeError(f"{name} must be an integer, got {described(value)}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {shown(value)}")


def check_floating_dtype(name: str, dtype: object) -> None:
    """Raise TypeError unless it is None or one that can train."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in SUPPORTED_DTYPES):
        raise TypeError(f"{name} must be None or one of {_listed_dtypes(SUPPORTED_DTYPES)}, got {shown(dtype)}")


def check_device(device: Any) -> None:
    """Raise unless it is None or what `torch.device` takes."""
    check_type("device", device, (torch.device, str, int), optional=True)
    try:
        torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise ValueError(f"device {shown(device)}: {str(error).splitlines()[0]}") from None


def check_frozen_weight(weight: torch.Tensor) -> None:
    """Raise unless `weight` is a dense, resident, frozen floating-point matrix."""
    check_type("weight", weight, torch.Tensor)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be a matrix [out, in], neither of them 0, got shape {tuple(weight.shape)}")
    if weight.device.type == "meta":
        raise ValueError("weight is on the meta device: the update is generated from its values, so load them first")
    if weight.dtype not in SUPPORTED_DTYPES:
        raise TypeError(
            f"weight has dtype {weight.dtype}: quantised weights are not supported, only "
            f"{_listed_dtypes(SUPPORTED_DTYPES)}"
        )
    if weight.layout != torch.strided:
        raise TypeError(f"weight has layout {weight.layout}; only dense (strided) weights are supported")
    if weight.requires_grad and not weight.is_leaf:
        raise ValueError(
            "weight requires grad, since it is computed from something that trains: freeze that, as weight_norm's "
            "weight_g and weight_v. Of FullyShardedDataParallel (FSDP1), which GenFT does not run under, it is a view: "
            "use fully_shard (FSDP2) or DistributedDataParallel"
        )
    if weight.requires_grad:
        raise ValueError("weight requires grad, but GenFT keeps it frozen: call weight.requires_grad_(False)")


def is_sharded(tensor: object) -> bool:
    """Whether it is a `DTensor`; nothing of torch's distributed tensors is imported to ask."""
    return type(tensor).__name__ == "DTensor" and type(tensor).__module__.startswith("torch.distributed")


def is_freed(tensor: torch.Tensor) -> bool:
    """Whether its memory was taken from it, as FSDP2 does with what it has gathered."""
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def check_linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> None:
    """Raise unless `x [..., in]`, `weight [out, in]` and `bias [out]` make a linear layer with a frozen weight.

    The handle of a quantised weight (genft_kernels/frozen_weight.py) was checked as it was made, and is of any dtype.
    """
    check_type("x", x, torch.Tensor)
    if x.is_nested:  # of two layouts, one without a shape
        raise TypeError("x is a nested tensor; only dense (strided) tensors are supported")
    for name, tensor in (("weight", weight), ("bias", bias), ("x", x)):
        if is_sharded(tensor):
            raise TypeError(
                f"{name} is a DTensor: there is no tensor parallelism (parallelize_module) of adapted layers, and "
                "under FSDP2 a layer is called within a forward of what fully_shard was called on"
            )
    # A FrozenWeight, whose module imports this one.
    handle = not isinstance(weight, torch.Tensor) and hasattr(weight, "dense")
    if not handle:
        check_frozen_weight(weight)
    out_features, in_features = weight.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must be [..., in] with in = {in_features} as in weight, got shape {tuple(x.shape)}")
    check_bias(bias, out_features)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"x is on {x.device} but {name} is on {tensor.device}")
        if not handle and tensor.dtype != x.dtype and not autocasts(x):
            raise TypeError(f"x has dtype {x.dtype} but {name} has {tensor.dtype}: cast one, or use torch.autocast")
    if x.layout != torch.strided:
        raise TypeError(f"x has layout {x.layout}; only dense (strided) tensors are supported")
    _check_dtype("x", x)


def check_bias(bias: torch.Tensor | None, out_features: int) -> None:
    """Raise unless `bias` is None or [out] of a floating-point dtype."""
    check_type("bias", bias, torch.Tensor, optional=True)
    if bias is None:
        return
    if tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias must be [out] = [{out_features}], got shape {tuple(bias.shape)}")
    _check_dtype("bias", bias)


def check_factors(h: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise unless `h [in, k]` and `b [out, k]` are the factors of an update of `weight [out, in]`."""
    check_type("h", h, torch.Tensor)
    check_type("b", b, torch.Tensor)
    out_features, in_features = weight.shape
    if h.dim() != 2 or h.shape[0] != in_features:
        raise ValueError(f"h must be [in, k] with in = {in_features} as in weight, got shape {tuple(h.shape)}")
    if b.dim() != 2 or b.shape[0] != out_features:
        raise ValueError(f"b must be [out, k] with out = {out_features} as in weight, got shape {tuple(b.shape)}")
    if h.shape[1] != b.shape[1] or h.shape[1] == 0:
        raise ValueError(f"h and b must share k of at least 1, got {h.shape[1]} and {b.shape[1]}")
    _check_factor("h", h)
    _check_factor("b", b)


def check_options(*, scale: object, activation: object, dropout: object, training: object) -> None:
    """Raise unless they are the settings of a factored update."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {shown(activation)}")
    if not is_finite(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a number in [0, 1), got {shown(dropout)}")
    if not is_finite(scale):  # a tensor's gradient would get lost
        raise ValueError(f"scale must be a finite number, got {shown(scale)}")
    check_flag("training", training)


def check_layout(config: GenFTConfig, in_features: int, out_features: int) -> None:
    """Raise ValueError unless `delta_layout` suits a weight of this shape."""
    if config.delta_layout == "out_in" and in_features != out_features:
        raise ValueError(
            f"delta_layout='out_in' needs a square weight, got [{out_features}, {in_features}]: use 'in_out'"
        )


def check_parameters(params: GeneratorParameters, config: GenFTConfig, out_features: int, in_features: int) -> None:
    """Raise unless `params` has exactly the tensors that `config` calls for, in the shapes of the layer."""
    check_type("params", params, GeneratorParameters)
    check_config(config)
    check_layout(config, in_features, out_features)
    for name, shape in expected_shapes(config, in_features, out_features, config.hidden_dim).items():
        tensor = getattr(params, name)
        if shape is None:
            if tensor is not None:
                raise ValueError(f"params.{name} must be None: the configuration has no such tensor")
        elif tensor is None:
            raise ValueError(f"params.{name} is missing: the configuration needs it as {list(shape)}")
        elif not isinstance(tensor, torch.Tensor):
            raise TypeError(f"params.{name} must be a Tensor, got {described(tensor)}")
        elif tuple(tensor.shape) != shape:
            raise ValueError(f"params.{name} must have shape {list(shape)}, got {list(tensor.shape)}")
        else:
            _check_factor(f"params.{name}", tensor)


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on for x; as everywhere in PyTorch, it leaves float64 alone."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a layer computes in: x's, or autocast's."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def check_transforms(backend: str) -> None:
    """Raise NotImplementedError within forward-mode differentiation or a transform of `torch.func`.

    An operation backend has gradients of the first order in reverse mode; a custom op would drop a tangent in silence.
    """
    if torch.compiler.is_compiling():
        return
    if _torch_private.differentiates_forward():
        raise NotImplementedError(
            f"backend {backend!r} has no forward-mode derivatives and no torch.func transforms: "
            'use backend="reference", which has them all'
        )


def check_not_onnx() -> None:
    """Raise RuntimeError within an export to ONNX, which has none of the operations of a generated update."""
    if _exports_to_onnx():
        raise RuntimeError(
            "ONNX has no operation for a generated update: call merge(model) before torch.onnx.export, or export "
            "remove_genft(model, keep_update=True)"
        )


@_torch_private.constant_in_graphs
def _exports_to_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def seed_tensor(seed: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A 64-bit seed as an int64 tensor [1] on `device`; a negative or wider integer raises ValueError."""
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed must be one int64 value, got {seed.dtype} of shape {tuple(seed.shape)}")
        return seed.reshape(1).to(device)
    if not is_integer(seed) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer in [0, 2**64) or an int64 tensor, got {shown(seed)}")
    seed = int(seed)
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed], dtype=torch.int64, device=device)


def draw_seed(device: torch.device) -> torch.Tensor:
    """A fresh seed, int64 [1], from the default generator of `device`."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _check_factor(name: str, tensor: torch.Tensor) -> None:
    _check_dtype(name, tensor)
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on the meta device: it has no values")


def _check_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}; supported are {_listed_dtypes(SUPPORTED_DTYPES)}")


def _listed_dtypes(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
