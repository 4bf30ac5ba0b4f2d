"""Sums of parts, in a fixed order: what kernels leave that cut a long sum, or have a part for each tile."""

import triton
import triton.language as tl

from ..launchers import Sum
from .launch import ceil_divide, named
from .math import activate


@triton.jit
def _sum_of(parts, outs, pres, bias, at, n, count, k, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """outs [n] = activation(sum of parts [count, n] + bias) at `at`; eight parts are on their way together."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    inside = at < n
    for start in range(0, count, 8):
        part = start + tl.arange(0, 8)
        mask = (part[:, None] < count) & inside[None, :]
        total += tl.sum(tl.load(parts + part[:, None].to(tl.int64) * n + at[None, :], mask=mask, other=0.0), axis=0)
    if bias is not None:
        total += tl.load(bias + at % k, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION != "identity":
        total = total.to(pres.dtype.element_ty)  # the gradient will see the rounded one, so the activation does too
        tl.store(pres + at, total, mask=inside)
        total = total.to(tl.float32)
    tl.store(outs + at, activate(total, ACTIVATION).to(outs.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "other_count"])
def _sum_parts(
    parts, outs, pres, bias, n, count, k, other_parts, other_outs, other_n, other_count,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _sum_of(parts, outs, pres, bias, at, n, count, k, ACTIVATION, BLOCK)
    if other_parts is not None:
        _sum_of(other_parts, other_outs, None, None, at, other_n, other_count, k, "identity", BLOCK)


@named
def sum_parts(first: Sum, second: Sum | None = None) -> None:
    """Write sums of parts, both in one launch."""
    (parts, to), block = first, 256
    other, other_out = (None, None) if second is None else (second.parts, second.outcome.out)
    n, other_n = to.out.numel(), 0 if other_out is None else other_out.numel()
    _sum_parts[(ceil_divide(max(n, other_n), block),)](
        parts, to.out, to.pre, to.bias, n, parts.shape[0], to.out.shape[-1],
        other, other_out, other_n, 0 if other is None else other.shape[0],
        ACTIVATION=to.activation, BLOCK=block, num_warps=2,
    )  # fmt: skip
