"""The arithmetic of a GPU where it differs from the interpreter's, for the interpreter."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from vitlinear.ops.triton import calls, plan

cast = InterpreterBuilder.cast_impl


def maximum_of_a_gpu(monkeypatch) -> None:
    """The larger or smaller operand, and NaN only if both are.

    The interpreter's own takes NaN, and so shows no kernel that drops it.
    """
    for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        monkeypatch.setattr(
            InterpreterBuilder, name, lambda self, a, b, f=function: self.binary_op(a, b, f)
        )


def tensor_cores(monkeypatch) -> None:
    """Products with operands of the precision that a plan for a GPU names.

    TF32 operands lose their last 13 bits, as in a tensor core; bfloat16 is rounded to nearest, ties
    to even, as by the instruction that converts. Sums stay in float32.
    """
    monkeypatch.setattr(InterpreterBuilder, "create_dot", _product)
    for name in ("create_fp_trunc", "create_fp_ext"):
        monkeypatch.setattr(InterpreterBuilder, name, _cast)
    monkeypatch.setattr(plan, "INTERPRETING", False)
    monkeypatch.setattr(plan, "_for_target", lambda precision: precision)
    monkeypatch.setattr(calls, "_prepared", {})


def _product(self, a, b, total, input_precision, max_num_imprecise_acc):
    precisions = (ir.INPUT_PRECISION.TF32, ir.INPUT_PRECISION.IEEE)
    assert input_precision in precisions, input_precision
    operands = []
    for x in (a, b):
        data = x.data
        if x.dtype.scalar == tl.bfloat16:
            data = _wide(data)
        elif x.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            data = (data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        operands.append(data.astype(np.float32))
    return TensorHandle(np.matmul(*operands) + total.data, total.dtype.scalar)


def _cast(self, x, dtype):
    source, target = x.dtype.scalar, dtype.scalar
    if source == tl.bfloat16 and target == tl.float32:
        return TensorHandle(_wide(x.data), target)
    if source != tl.float32 or target != tl.bfloat16:
        return cast(self, x, dtype)
    bits = np.ascontiguousarray(x.data).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nearest = np.where(np.isnan(x.data), np.uint32(0x7FC0), nearest)
    return TensorHandle(nearest.astype(np.uint16), target)


def _wide(bits):
    """bfloat16 as float32."""
    return (bits.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
