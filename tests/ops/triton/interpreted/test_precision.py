"""The precisions of products that a plan for a GPU names, in an emulation of its tensor cores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.ops.inputs import make_inputs
from tests.ops.triton.cases import ROUNDING, check_exactness
from tests.ops.triton.gpu_arithmetic import tensor_cores
from tests.pairwise import pairwise
from vitlinear import ops
from vitlinear.ops.triton import blocks


@triton.jit
def as_it_is(x):
    return x.to(tl.float32)


@pytest.fixture(autouse=True)
def products_of_a_gpu(monkeypatch):
    tensor_cores(monkeypatch)


@pairwise(every=2, mechanism=ops.MECHANISMS, dtype=ROUNDING)
def test_as_exact_as_eager(mechanism, dtype):
    check_exactness(mechanism, make_inputs(grid=(14, 14), dim=32, batch=1, heads=1, dtype=dtype))


def test_the_emulation_sees_operands_that_are_cut_off(monkeypatch):
    monkeypatch.setattr(blocks, "_nearest_tf32", as_it_is)
    inputs = make_inputs(grid=(14, 14), dim=32, batch=1, heads=1, dtype=torch.float16)
    with pytest.raises(AssertionError, match="output: error"):
        check_exactness("mala", inputs)


@triton.jit
def round_all(bits, into, size: tl.constexpr):
    at = tl.arange(0, size)
    x = tl.load(bits + at).to(tl.float32, bitcast=True)
    tl.store(into + at, blocks._nearest_tf32(x).to(tl.int32, bitcast=True))


def nearest_tf32(x):
    """The nearest numbers of 11 binary digits, ties away from zero, in arithmetic of float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        x = x.astype(np.float64)
        _, exponent = np.frexp(x)
        step = np.ldexp(1.0, np.maximum(exponent, -125) - 11)  # subnormal numbers share theirs
        return (np.trunc(x / step + np.copysign(0.5, x)) * step).astype(np.float32)


def test_operands_in_tf32_are_the_nearest():
    """NaN stays NaN, whose bits alone would become a zero or an infinity."""
    not_numbers = [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000]
    infinite = [0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFF7FFFFF]  # the largest is rounded to it
    finite = [0x7F7FEFFF, 0x3F800FFF, 0x3F801000, 0x3F801001, 0x3F803000, 0xBF801000, 0x3FFFF000]
    small = [0, 0x80000000, 1, 0x80000001, 0x00000FFF, 0x00001000, 0x00800000, 0x007FFFFF]
    some = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    bits = np.array([*not_numbers, *infinite, *finite, *small, *some], np.uint32)
    expected = nearest_tf32(bits.view(np.float32))
    found = torch.empty(1024, dtype=torch.int32)
    round_all[(1,)](torch.from_numpy(bits.view(np.int32)), found, bits.size)
    found = found.numpy().view(np.float32)
    numbers = ~np.isnan(expected)
    assert not numbers[:5].any() and np.isinf(expected[5:9]).all() and bits.size == found.size
    assert np.array_equal(np.isnan(found), ~numbers)
    # bit by bit, the sign of zero too
    assert np.array_equal(found[numbers].view(np.uint32), expected[numbers].view(np.uint32))
