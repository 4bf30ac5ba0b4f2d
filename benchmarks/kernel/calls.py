"""The kernels of a backend as calls on random operands, with what each must move and multiply at least."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.layer.cases import FORMS, Layer
from genft_kernels.philox import ROW_STREAM


@dataclasses.dataclass(frozen=True)
class Call:
    """A kernel on operands of its own.

    Args:
        kernel: its name in the module of kernels.
        run: the call.
        operands: what must be read or written, each once; results are added to them.
        multiplications: of scalars, two operations each.
        tokens, form: None where the kernel does not depend on them.
    """

    kernel: str
    run: Callable[[], object]
    operands: tuple[Tensor, ...]
    multiplications: int
    tokens: int | None = None
    form: str | None = None

    def moved_bytes(self) -> int:
        """Of the operands and of what a run returns."""
        results = self.run()
        results = results if isinstance(results, (tuple, list)) else [results]
        tensors = [*self.operands, *(each for each in results if each is not None)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weight_side(kernels: ModuleType, layer: Layer, k: int, dtype: torch.dtype, device: torch.device) -> Iterator[Call]:
    """The kernels that do not see x; those that take several layers take all of the model's, at most 24."""
    random, n_in, n_out = _random(device, dtype), layer.in_features, layer.out_features
    count, work = min(layer.count, 24), layer.in_features * layer.out_features * k
    weights = list(random(count, n_out, n_in))
    down, grad, pre = random(count, k, n_in), random(count, n_out, k), random(count, n_out, k)
    yield Call(
        "thin_product", lambda: kernels.thin_product(weights, down, None, "tanh"), (*weights, down), count * work
    )
    yield Call(
        "thin_transposed",
        lambda: kernels.thin_transposed(grad, weights, pre, "tanh"),
        (*weights, grad, pre),
        count * work,
    )
    left, right, row_down, dz = (random(count, *shape) for shape in ((n_out, k), (n_in, k), (k, n_out), (n_in, k)))
    seeds = torch.arange(count, device=device)
    h, b = random(n_in, k), random(n_out, k)
    for form in FORMS:
        activation, dropout = _update(form)
        stages = seeds, activation, dropout, "identity"
        if form != "factored":
            yield Call(
                "row_forward",
                functools.partial(kernels.row_forward, left, right, row_down, None, *stages),
                (left, right, row_down),
                2 * count * work,
                form=form,
            )
            yield Call(
                "row_backward",
                functools.partial(
                    kernels.row_backward, dz, left, right, row_down, None, *stages, [True, True, True, False]
                ),
                (dz, left, right, row_down),
                5 * count * work,
                form=form,
            )
        update = seeds[:1], 0.5, activation, dropout, ROW_STREAM
        yield Call(
            "fold", functools.partial(kernels.fold, weights[0], h, b, *update), (weights[0], h, b), work, form=form
        )


def product(layer: Layer, tokens: int, dtype: torch.dtype, device: torch.device) -> Call:
    """PyTorch's product of x [tokens, in] and W [out, in]."""
    random = _random(device, dtype)
    x, weight = random(tokens, layer.in_features), random(layer.out_features, layer.in_features)
    return Call("product", lambda: F.linear(x, weight), (x, weight), tokens * weight.numel(), tokens=tokens)


def token_side(
    kernels: ModuleType, layer: Layer, tokens: int, k: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Call]:
    """The kernels that see x."""
    random, n_in, n_out = _random(device, dtype), layer.in_features, layer.out_features
    big, thin_work = tokens * n_in * n_out, n_in * n_out * k
    x, dy, weight, h, b = (
        random(*shape) for shape in ((tokens, n_in), (tokens, n_out), (n_out, n_in), (n_in, k), (n_out, k))
    )
    xh, transposed, seed = random(tokens, k), h.t()[None].contiguous(), torch.tensor([3], device=device)
    at = dict(tokens=tokens)
    yield Call(
        "thin_product",
        lambda: kernels.thin_product([x], transposed, None, "identity"),
        (x, h),
        tokens * n_in * k,
        **at,
    )
    yield Call(
        "thin_transposed",
        lambda: kernels.thin_transposed(xh[None], [dy], None, "identity"),
        (xh, dy),
        tokens * n_out * k,
        **at,
    )
    yield Call(
        "extended_k",
        lambda: kernels.extended_k(x, weight, None, xh, b, 0.5),
        (x, weight, xh, b),
        big + tokens * n_out * k,
        **at,
        form="factored",
    )
    for form in FORMS:
        activation, dropout = _update(form)
        update = seed, 0.5, activation, dropout, ROW_STREAM
        if form == "factored":
            continue
        if tokens <= 1024:  # beyond, its second product for each tile of tokens is many big ones
            yield Call(
                "main_loop",
                functools.partial(kernels.main_loop, x, weight, None, h, b, *update, over_out=False),
                (x, weight, h, b),
                big + thin_work,
                **at,
                form=form,
            )
        yield Call(
            "contract",
            functools.partial(kernels.contract, dy, x, h, b, *update, True, True),
            (dy, x, h, b),
            big + 3 * thin_work,
            **at,
            form=form,
        )


def _update(form: str) -> tuple[str, float]:
    """(psi, dropout)."""
    return FORMS[form].get("outer_activation", "identity"), FORMS[form].get("dropout", 0.0)


def _random(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(shape, device=device).mul_(shape[-1] ** -0.5).to(dtype)
