"""The kernels of a backend as calls on random operands, with what each must move and multiply at least."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.layer.cases import FORMS, Layer
from genft_kernels.backends.launchers import Update
from genft_kernels.backends.plan import Kernels
from genft_kernels.philox import COLUMN_STREAM, ROW_STREAM
from genft_kernels.update import unit_multiple

TILED = ("tiled", "dropout")  # the factored form's products are a vendor's


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


def weight_side(kernels: Kernels, layer: Layer, k: int, dtype: torch.dtype, device: torch.device) -> Iterator[Call]:
    """The kernels that do not see x; those that take several layers take all of the model's, at most 24."""
    random, n_in, n_out = _random(device, dtype), layer.in_features, layer.out_features
    k = handed_over(k, device, dtype)
    count, work = min(layer.count, 24), layer.in_features * layer.out_features * k
    weights = list(random(count, n_out, n_in))
    down, grad = random(count, k, n_in), random(count, n_out, k)
    thin = functools.partial(kernels.thin_product, weights, down, None, "tanh")
    yield Call("thin_product", thin, (*weights, down), count * work)
    transposed = functools.partial(kernels.thin_transposed, grad, weights)
    yield Call("thin_transposed", transposed, (*weights, grad), count * work)
    left, right, row_down, dz = (random(count, *shape) for shape in ((n_out, k), (n_in, k), (k, n_out), (n_in, k)))
    row = left, right, row_down
    seeds = torch.arange(count, device=device)
    h, b = random(n_in, k), random(n_out, k)
    for form in TILED:
        update = Update(b, h, *_form(form), seeds[:1], ROW_STREAM)
        fold = functools.partial(kernels.fold, weights[0], update, 0.5)
        yield Call("fold", fold, (weights[0], h, b), work, form=form)
        y = Update(left, right, *_form(form), seeds, COLUMN_STREAM)
        forward = functools.partial(kernels.row_forward, y, row_down, None, "identity")
        yield Call("row_forward", forward, row, 2 * count * work, form=form)
        backward = functools.partial(kernels.row_backward, dz, y, row_down, None, "identity", [True, True, True, False])
        yield Call("row_backward", backward, (dz, *row), 5 * count * work, form=form)


def vendor(
    layer: Layer, tokens: int, ks: Iterable[int], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[int | None, Call]]:
    """PyTorch's products of x [tokens, in] and W [out, in], and of x and thin matrices: (k, call)."""
    random, n_in = _random(device, dtype), layer.in_features
    x, weight = random(tokens, n_in), random(layer.out_features, n_in)
    yield None, Call("product", lambda: F.linear(x, weight), (x, weight), tokens * weight.numel(), tokens)
    for k in ks:
        units = handed_over(k, device, dtype)
        h, small = random(n_in, units), random(tokens, units)
        yield k, Call("thin_product", functools.partial(torch.mm, x, h), (x, h), tokens * h.numel(), tokens)
        transposed = functools.partial(torch.mm, x.t(), small)
        yield k, Call("thin_transposed", transposed, (x, small), tokens * h.numel(), tokens)


def token_side(
    kernels: Kernels, layer: Layer, tokens: int, k: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Call]:
    """The kernels over tokens: `contract`, and the thin products, which operations take of W alone."""
    random, n_in, n_out = _random(device, dtype), layer.in_features, layer.out_features
    k = handed_over(k, device, dtype)
    big, thin_work = tokens * n_in * n_out, n_in * n_out * k
    x, dy, h, b = (random(*shape) for shape in ((tokens, n_in), (tokens, n_out), (n_in, k), (n_out, k)))
    xh, down, seed = random(tokens, k), h.t()[None].contiguous(), torch.tensor([3], device=device)
    thin = functools.partial(kernels.thin_product, [x], down, None, "identity")
    yield Call("thin_product", thin, (x, h), tokens * n_in * k, tokens)
    transposed = functools.partial(kernels.thin_transposed, xh[None], [dy])
    yield Call("thin_transposed", transposed, (xh, dy), tokens * n_out * k, tokens)
    for form in TILED:
        update = Update(b, h, *_form(form), seed, ROW_STREAM)
        contract = functools.partial(kernels.contract, dy, x, update, 0.5, [True, True])
        yield Call("contract", contract, (dy, x, h, b), big + 3 * thin_work, tokens, form)


def handed_over(k: int, device: torch.device, dtype: torch.dtype) -> int:
    """The hidden units of thin matrices where a layer has k: with the zero units that its device likes."""
    return k + -k % unit_multiple(device, dtype)


def _form(form: str) -> tuple[str, float]:
    """(psi, dropout)."""
    return FORMS[form].get("outer_activation", "identity"), FORMS[form].get("dropout", 0.0)


def _random(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(shape, device=device).mul_(shape[-1] ** -0.5).to(dtype)
