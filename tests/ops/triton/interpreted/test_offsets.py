"""Offsets are 64 bits wide: the interpreter computes in the widths that a GPU would."""

from __future__ import annotations

import builtins
import mmap
import sys

import pytest
import torch
from triton.runtime import interpreter

from vitlinear import ops
from vitlinear.ops.backward import LinearGradients
from vitlinear.ops.terms import Terms
from vitlinear.ops.triton import calls, launch, memory

NO_RESERVE = 0x4000  # of Linux; Python's mmap names it from 3.13 on

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs memory without pages")


def without_pages(size, dtype):
    """Zeros in memory of which only the pages in use exist.

    As many stand before them as 32 bits reach: an offset that is too large for them finds zeros.
    """
    pages = mmap.mmap(-1, (2**31 + size) * dtype.itemsize, mmap.MAP_PRIVATE | NO_RESERVE)
    return torch.frombuffer(pages, dtype=dtype)[2**31 :]


def far_apart(x, axis):
    """x with a stride that fits into 32 bits, unlike the offset of the last along an axis.

    Nor does that of the last but one, where there are more than three: one may be padding.
    """
    if axis >= x.dim() or x.shape[axis] == 1:
        return x.clone()
    strides = [*x.stride()]
    strides[axis] = 2**31 // max(x.shape[axis] - 2, 2) + 16
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    return without_pages(size, x.dtype).as_strided(x.shape, strides, 2**31).copy_(x)


def passes(mechanism, given, into):
    """Output and state; gradients of q, k, v, lepe, gate and weights are written."""
    grad, q, k, v, lepe, gate, weights, mask = given
    terms = Terms(None, mask, None, lepe, gate, None, weights)
    of_q, of_k, of_v, of_lepe, of_gate, of_weights = into
    grads = LinearGradients(of_q, of_k, of_v, None, of_lepe, of_gate, None, of_weights)
    row = ops.get_mechanism(mechanism)
    out, state = launch.forward(q, k, v, row, terms)
    launch.backward(grad, q, k, v, row, terms, state, grads)
    return out, state


@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["batch", "tokens", "heads", "channels"])
@pytest.mark.parametrize("mechanism", ["mala", "weighted_identity", "gated_identity"])
def test_strides_beyond_32_bits(mechanism, axis):
    shape = [1, 33, 1, 8] if axis == 1 else [1, 3, 1, 8]
    if axis in (0, 2):
        shape[axis] = 3
    given = [torch.randn(shape, dtype=torch.float16) for _ in range(6)]
    numbers = ops.get_mechanism(mechanism).weights_per_key(8)
    given.append(torch.rand(*shape[:3], numbers) if numbers else None)
    mask = torch.zeros(shape[:2], dtype=torch.bool)
    mask[-1, -1] = True  # zeros around it would be none
    given.append(mask)

    def zeros():
        return [None if x is None else torch.zeros_like(x) for x in given[1:7]]

    def far(tensors):
        return [None if x is None else far_apart(x, axis) for x in tensors]

    grads, far_grads = zeros(), far(zeros())
    expected, _ = passes(mechanism, given, grads)
    out, _ = passes(mechanism, far(given), far_grads)
    assert torch.equal(out, expected) and expected.any()
    for found, exact in zip(far_grads, grads, strict=True):
        assert exact is None or (torch.equal(found, exact) and exact.any())


@pytest.mark.parametrize("splits", [1, 3], ids=["one kernel", "splits"])
def test_slots_beyond_32_bits(splits, monkeypatch):
    """States of so many samples, of which the programs of the last one alone run."""
    samples, rows, values = 2**18 + 1, 128, 64  # rows x values x the last sample is 2^31
    monkeypatch.setattr(calls, "SHORTEST_CUT", 17)
    monkeypatch.setattr(calls, "splits_that_fill", lambda slots, at_once: splits)
    monkeypatch.setattr(calls, "MERGE_BLOCK", 4096)
    monkeypatch.setattr(calls, "_prepared", {})
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)

    def last(*bounds):
        return builtins.range(*bounds)[-1 if bounds == (samples,) else 0 :]

    def vectors(layout):
        pieces = without_pages(layout.size, torch.float32).split(layout._sizes)
        return layout._pick((*pieces, None))

    monkeypatch.setattr(interpreter, "range", last, raising=False)
    monkeypatch.setattr(memory.Layout, "vectors", vectors)
    q, k = torch.randn(2, 1, 33, 1, rows)
    grad, v, lepe, gate = torch.randn(4, 1, 33, 1, values)
    given = (grad, q, k, v, lepe, gate)

    def run(number):
        """Of as many samples that share their memory."""
        grads = [torch.zeros_like(x) for x in given[1:]]
        many = [x.expand(number, -1, -1, -1) for x in (*given, *grads)]
        out, state = passes("mala", (*many[:6], None, None), (*many[6:], None))
        return [out[-1], state.state[-1], state.norm[-1], *grads]

    for found, expected in zip(run(samples), run(1), strict=True):
        assert torch.equal(found, expected) and expected.any()
