"""bf16 and fused multiply-add in Triton's CPU interpreter as a GPU has them.

Left alone, the interpreter truncates fp32 → bf16 (half of all values differ, with a bias of −0.28 %), adds bf16 as
raw bit patterns, and rounds the product within a multiply-add. `mend()` rounds to nearest even, computes bf16 through
fp32, and fp32 multiply-adds through fp64, where the product of two fp32 numbers is exact. It changes nothing outside
the interpreter, which is chosen by TRITON_INTERPRET=1 before triton is imported. For triton 3.6 and 3.7.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 → bf16 bit patterns (uint16), to nearest even; every NaN becomes the quiet one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.reshape(np.shape(values)))


def bf16_to_float(patterns: np.ndarray) -> np.ndarray:
    """bf16 bit patterns (uint16) → fp32."""
    widened = np.ascontiguousarray(patterns).astype(np.uint32) << np.uint32(16)
    return widened.view(np.float32).reshape(np.shape(patterns))


def mend() -> None:
    """Replace the interpreter's casts and arithmetic on bf16, and its fp32 multiply-add; a second call does nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "mended", False):
        return
    builder.mended = True
    handle = interpreter.TensorHandle
    plain_cast, plain_float_cast, plain_binary = builder.cast_impl, builder.create_fp_to_fp, builder.binary_op
    plain_fma = builder.create_fma

    def cast_impl(self, source, destination):
        old, new = source.dtype.scalar, destination.scalar
        if old == tl.bfloat16 and new == tl.float32:
            return handle(bf16_to_float(source.data), new)
        if old == tl.float32 and new == tl.bfloat16:
            return handle(round_to_bf16(source.data), new)
        if old == tl.bfloat16:
            return plain_cast(self, cast_impl(self, source, tl.float32), destination)
        if new == tl.bfloat16:
            return cast_impl(self, plain_cast(self, source, tl.float32), destination)
        return plain_cast(self, source, destination)

    def create_fp_to_fp(self, source, destination, rounding):
        if {source.dtype.scalar, destination.scalar} == {tl.bfloat16, tl.float32}:
            return cast_impl(self, source, destination)
        return plain_float_cast(self, source, destination, rounding)

    def binary_op(self, left, right, operation):
        if left.dtype.scalar == tl.bfloat16 and right.dtype.scalar == tl.bfloat16 and left.data.dtype == np.uint16:
            result = operation(bf16_to_float(left.data), bf16_to_float(right.data))
            return handle(result if result.dtype == bool else round_to_bf16(result), tl.bfloat16)
        return plain_binary(self, left, right, operation)

    def create_fma(self, x, y, z):
        if x.data.dtype != np.float32:
            return plain_fma(self, x, y, z)
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
        return handle(exact.astype(np.float32), x.dtype.scalar)

    builder.cast_impl, builder.create_fp_to_fp, builder.binary_op = cast_impl, create_fp_to_fp, binary_op
    builder.create_fma = create_fma
