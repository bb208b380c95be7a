"""Depthwise convolutions and their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.onednn import needs_onednn
from vitlinear.ops.cpu.depthwise import _DepthwiseConv, depthwise_conv, residual_depthwise_conv


def inputs(side: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32):
    """A map, channels-last in memory, kernels and biases."""
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(shape[1], 1, side, side, dtype=dtype)
    return [t.requires_grad_() for t in (x, weight, torch.randn(shape[1], dtype=dtype))]


def gradients(function, tensors):
    out = function(*tensors)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return out, torch.autograd.grad(out, tensors, grad)


@pytest.mark.quick
@pytest.mark.parametrize("side", [3, 5, 7])
@pytest.mark.parametrize("shape", [(2, 6, 9, 11), (1, 16, 2, 3), (3, 4, 1, 1)])
def test_outputs_and_gradients(side, shape):
    tensors = inputs(side, shape)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    out, found = gradients(depthwise_conv, tensors)
    expected, oracle = gradients(
        lambda x, w, b: F.conv2d(x, w, b, padding=side // 2, groups=len(w)), wide
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, oracle, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_gradients_of_gradients():
    tensors = inputs(5, (1, 2, 4, 3), torch.float64)
    assert torch.autograd.gradcheck(_DepthwiseConv.apply, tensors)
    assert torch.autograd.gradgradcheck(_DepthwiseConv.apply, tensors)


def test_many_gradients_at_once_of_a_forward_pass_outside():
    x, weight, bias = inputs(5, (1, 2, 4, 3))
    out = depthwise_conv(x, weight, bias)

    def gradients_of(grad):
        return torch.autograd.grad(out, (x, weight), grad, retain_graph=True)

    grads = torch.randn(3, *out.shape)
    found, expected = torch.func.vmap(gradients_of)(grads), gradients_of(grads[2])
    for several, one in zip(found, expected, strict=True):
        torch.testing.assert_close(several[2], one)


@pytest.mark.parametrize("side", [3, 5])
def test_residual(side):
    tensors = inputs(side, (2, 6, 9, 11))
    wide = [t.detach().double().requires_grad_() for t in tensors]
    out, found = gradients(residual_depthwise_conv, tensors)
    expected, oracle = gradients(lambda x, w, b: x + depthwise_conv(x, w, b), wide)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, oracle, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.compile
@needs_onednn
def test_compiled_programs_put_the_weight_gradient_together():
    programs = []

    def keep(program, _):
        programs.append(program)
        return make_boxed_func(program.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(depthwise_conv, backend=backend, fullgraph=True, dynamic=True)
    for shape in [(2, 6, 9, 11), (3, 6, 7, 5)]:
        tensors = inputs(5, shape)
        out, found = gradients(compiled, tensors)
        expected, eager = gradients(depthwise_conv, tensors)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(found, eager)
    # In the program: newer profilers do not name registered operators that a program calls.
    targets = {str(node.target) for program in programs for node in program.graph.nodes}
    assert "vitlinear.depthwise_weight_gradient.default" in targets


def test_flops_of_the_weight_gradient():
    x, weight = torch.randn(2, 6, 9, 8), torch.randn(6, 1, 5, 5)
    with FlopCounterMode(display=False) as counter:
        torch.ops.vitlinear.depthwise_weight_gradient(torch.ones_like(x), x, weight)
    assert counter.get_total_flops() == 2 * x.numel() * 5 * 5


@needs_onednn
def test_where_the_weight_gradient_is_put_together():
    def pieces(side: int, dtype: torch.dtype = torch.float32) -> int:
        tensors = inputs(side, (1, 4, 8, 8), dtype)
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            depthwise_conv(*tensors).sum().backward()
        return sum(e.count for e in trace.key_averages() if e.key == "aten::convolution_backward")

    assert [pieces(side) for side in (3, 5, 7)] == [1, 1 + 4, 1 + 9]
    assert pieces(5, torch.float64) == 1


@needs_onednn
def test_many_gradients_at_once():
    x, weight = torch.randn(1, 2, 4, 3), torch.randn(2, 1, 5, 5)

    def gradients(vectorized):
        inputs = (x, weight, torch.zeros(2))
        return torch.autograd.functional.jacobian(depthwise_conv, inputs, vectorize=vectorized)

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-5, atol=1e-5)
