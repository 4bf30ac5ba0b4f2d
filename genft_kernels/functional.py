"""The functional interface: one layer's update generated and applied, on a chosen backend.

`factored_linear` is the token side of docs/method.md#two-products; `genft_linear` generates the factors first.
"""

from __future__ import annotations

import torch

from . import backends, reference
from .arguments import check_flag
from .checks import check_factors, check_linear, check_options, check_parameters, check_transforms, compute_dtype
from .config import GenFTConfig, is_factored
from .parameters import GeneratorParameters, as_group
from .philox import ROW_STREAM
from .update import Action, Factors, apply_factors, forward_seed, generate_factors, with_zero_units

__all__ = ["factored_linear", "genft_linear"]


def genft_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    params: GeneratorParameters,
    config: GenFTConfig,
    *,
    training: bool = False,
    seed: int | torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """A frozen linear layer with its generated update: y = x (W + dW)^T + bias (docs/method.md#the-method).

    Args:
        x: [..., in], any leading shape, zero tokens included, any strides.
        weight: the frozen W [out, in], any strides.
        bias: [out] or None.
        params: the layer's tensors; cast to x's dtype and device, gradients come back in their own.
        config: the method's settings; `params` must fit it.
        training: whether dropout is active.
        seed: 64-bit seed of the dropout masks and of stochastic rounding; None draws one, in training and where it
            is needed, from the default generator of x's device.
        backend: "auto", or one by name (`genft_kernels.backends`).

    Returns:
        y [..., out] in x's dtype, or in autocast's.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run on x's device.
        NotImplementedError: forward-mode differentiation or a `torch.func` transform, on another backend than
            "reference".
    """
    check_linear(x, weight, bias)
    check_parameters(params, config, *weight.shape)
    check_flag("training", training)
    dtype, dropout = compute_dtype(x), config.dropout if training else 0.0
    backend = backends.checked_request(backend, x.device, dtype, not is_factored(config.outer_activation, dropout))
    if backend == "reference":
        return reference.genft_linear(x, weight, bias, params, config, training=training, seed=seed)
    check_transforms(backend)
    seed = forward_seed(seed, x.device, training, dropout, config.outer_activation, dtype)
    group = as_group(params)
    generated = generate_factors([weight], group, config, dtype=dtype, dropout=dropout, seed=seed, backend=backend)
    (factors,) = generated.unbind()
    action = Action(config.scaling, config.outer_activation, dropout, seed)
    return apply_factors(x, weight, bias, factors, action, backend)


def factored_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    h: torch.Tensor,
    b: torch.Tensor,
    *,
    scale: float = 1.0,
    activation: str = "identity",
    dropout: float = 0.0,
    training: bool = False,
    seed: int | torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """A frozen linear layer with a factored update: y = x (W + scale * drop(psi(b h^T)))^T + bias.

    With `activation="identity"` and no dropout it is LoRA with h = A^T, b = B (docs/method.md#two-products).

    Args:
        h: [in, k]; b: [out, k]; cast to x's dtype, gradients come back in their own.
        activation: psi, one of identity, relu, leaky_relu, gelu, silu, tanh.
        dropout: p in [0, 1), on the elements of the update, active only with `training=True`.
        x, weight, bias, seed, backend: as in `genft_linear`; returns and raises as there.
    """
    check_linear(x, weight, bias)
    check_factors(h, b, weight)
    check_options(scale=scale, activation=activation, dropout=dropout, training=training)
    dtype, dropout = compute_dtype(x), dropout if training else 0.0
    backend = backends.checked_request(backend, x.device, dtype, not is_factored(activation, dropout))
    if backend == "reference":
        return reference.factored_linear(
            x, weight, bias, h, b, scale=scale, activation=activation, dropout=dropout, training=training, seed=seed
        )
    check_transforms(backend)
    seed = forward_seed(seed, x.device, training, dropout, activation, dtype)
    h, b = (with_zero_units(factor.to(x.device, dtype), -1) for factor in (h, b))
    action = Action(scale, activation, dropout, seed)
    return apply_factors(x, weight, bias, Factors(h, b, ROW_STREAM), action, backend)
