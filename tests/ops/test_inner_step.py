"""The inner training step of ViT³ against autograd, its derivatives, and its edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitlinear.ops.inner_step import gated, inner_values, stepped


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def unit(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return (x @ w1) * F.silu(x @ w2)


def test_step_is_gradient_descent():
    """On -(c/N) sum v . f(k), whose gradient is normed by column."""
    k, v = torch.randn(2, 9, 4, dtype=torch.float64)
    weights = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = -(v * unit(k, *weights)).sum() / 9 / 3
    (grad,) = torch.autograd.grad(loss, weights)
    expected = weights - grad / (grad.norm(dim=1, keepdim=True) + 1)

    first = torch.cat(tuple(weights), dim=1)
    state = k.T @ inner_values(v, k @ first) / 9
    w1, w2 = stepped(first, state, 0).chunk(2, dim=1)
    torch.testing.assert_close(torch.stack((w1, w2)), expected)
    q = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(gated(q @ torch.cat((w1, w2), dim=1)), unit(q, w1, w2))


@pytest.mark.parametrize("plain", [False, True])
def test_derivatives(plain, monkeypatch):
    """Of the form that keeps less, and of the one that compilers see."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: plain)
    v = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    reads = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    for function, inputs in ((inner_values, (v, reads)), (gated, (reads,))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_step_where_the_state_vanishes():
    """A norm of 0 has no derivative; the step has one, c, and so has its gradient."""
    state = torch.zeros(2, 3, dtype=torch.float64)
    state[:, 1] = torch.randn(2)
    state.requires_grad_()
    out = stepped(torch.ones(2, 3), state, 0)
    assert torch.equal(out[:, 0], torch.ones(2, dtype=torch.float64))
    (grad,) = torch.autograd.grad(out.sum(), state, create_graph=True)
    torch.testing.assert_close(grad[:, 0], torch.full((2,), 1 / 3, dtype=torch.float64))
    (second,) = torch.autograd.grad(grad.square().sum(), state)
    assert second.isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e10])
def test_step_is_shorter_than_one(size):
    state = size * torch.randn(3, 8)
    step = stepped(torch.zeros(3, 8), state.requires_grad_(), 0)
    assert (step.norm(dim=0) < 1 + 1e-6).all()
    if size < 1:
        torch.testing.assert_close(step, state / 3)
    step.sum().backward()
    assert state.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once(dtype):
    v, reads = torch.randn(3, 4).to(dtype), torch.randn(3, 8).to(dtype)
    for function, inputs in ((inner_values, (v, reads)), (gated, (reads,))):
        out = function(*inputs)
        assert out.dtype == dtype
        assert torch.equal(out, function(*(x.float() for x in inputs)).to(dtype))


def test_float16_saturates():
    v = torch.full((1, 1), 6e4, dtype=torch.float16, requires_grad=True)
    reads = torch.full((1, 2), 6e4, dtype=torch.float16, requires_grad=True)
    for out in (inner_values(v, reads), gated(reads)):
        assert (out == 65504).all()
        grads = torch.autograd.grad(out.float().sum(), (v, reads), allow_unused=True)
        assert all(grad is None or grad.isfinite().all() for grad in grads)
