"""Mends for Triton's interpreter, applied where TRITON_INTERPRET=1 (tests/backends/test_triton.py proves the need).

The interpreter holds a bfloat16 as the uint16 of its bits. Its products multiply those integers, its casts from
float32 cut bits off, and its arithmetic adds them: silently wrong. Here bfloat16 is widened to float32 before
arithmetic and rounded to nearest even after it. Triton 3.6.0 with numpy 2.4 also refuses a loop bound that is a
one-element array.
"""

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle):
    """A float32 handle of the same values, if it is bfloat16."""
    if not _is_bf16(handle):
        return handle
    return _Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> the uint16 bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _narrowed(values: np.ndarray):
    return _Handle(_bf16_bits(values), tl.bfloat16)


def install() -> None:
    """Patch the interpreter of this process."""
    dot, cast, binary, patch_tensor = (
        _Builder.create_dot,
        _Builder.cast_impl,
        _Builder.binary_op,
        interpreter._patch_lang_tensor,
    )

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return dot(self, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)

    def cast_impl(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return _narrowed(source.data)
        return cast(self, source, target)

    def binary_op(self, left, right, operation):
        if not _is_bf16(left):
            return binary(self, left, right, operation)
        result = operation(_widened(left).data, _widened(right).data)
        return _Handle(result, tl.int1) if result.dtype == bool else _narrowed(result)

    def _patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    _Builder.create_dot, _Builder.cast_impl, _Builder.binary_op = create_dot, cast_impl, binary_op
    interpreter._patch_lang_tensor = _patch_lang_tensor
