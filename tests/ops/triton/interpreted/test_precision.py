"""The precisions of products that a plan for a GPU names, in an emulation of its tensor cores."""

from __future__ import annotations

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
