"""Offsets are 64 bits wide: the interpreter computes in the widths that a GPU would."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

from tests.ops.inputs import make_inputs
from tests.ops.triton.cases import run
from vitlinear import ops
from vitlinear.ops.backward import LinearGradients
from vitlinear.ops.terms import Terms
from vitlinear.ops.triton import launch

SHAPE = BATCH, LENGTH, HEADS, DIM = 2, 33, 2, 8
NEAR = (LENGTH * HEADS * DIM, HEADS * DIM, DIM, 1)
NO_RESERVE = 0x4000  # of Linux; Python's mmap names it from 3.13 on


def far_apart(x, strides):
    """x with strides of gibibytes, in memory of which only the pages in use exist."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    memory = mmap.mmap(-1, size * x.element_size(), mmap.MAP_PRIVATE | NO_RESERVE)
    far = torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, strides)
    return far.copy_(x)


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory without pages")
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "tokens", "heads"])
def test_strides_beyond_32_bits(axis):
    inputs = make_inputs(grid=(3, 11), dim=DIM, batch=BATCH, heads=HEADS, dtype=torch.float16)
    row, terms = ops.get_mechanism("mala"), Terms(inputs.rotary)
    tokens = [inputs.grad, *inputs.projection.detach().unbind(2)[:3]]
    strides = [*NEAR]
    strides[axis] = 2**32 // (SHAPE[axis] - 1) + 16  # elements; the last is beyond 32 bits
    grad, q, k, v = (far_apart(x, strides) for x in tokens)
    grads = [far_apart(torch.zeros_like(x), strides) for x in tokens[1:]]
    out, state = launch.forward(q, k, v, row, terms)
    launch.backward(grad, q, k, v, row, terms, state, LinearGradients(*grads, None, None, None))
    expected, projection = run("mala", inputs)
    assert torch.equal(out, expected)
    for found, exact in zip(grads, projection.unbind(2), strict=False):
        assert torch.equal(found, exact)
