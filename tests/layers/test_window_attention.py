"""Unmasked windows, local concentration, plain linear attention: against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from tests.ops.inputs import ANY_LAYER
from vitlinear.layers import LinearAttention, LocalConcentration, PaddedWindowAttention
from vitlinear.layers.attention.cross_shaped_attention import CrossShapedAttention
from vitlinear.layers.attention.shifted_window_attention import ShiftedWindowAttention
from vitlinear.layers.windows import from_windows, gather_map, gather_windows, to_windows
from vitlinear.ops import naive


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.quick
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (4, 9), (7, 5)])
def test_padded_window_attention(size):
    layer = PaddedWindowAttention(12, 3, window_size=4).double()
    height, width = size
    x = torch.randn(2, height, width, 12).double().requires_grad_()
    padded = torch.zeros(2, 8, 12, 12).double()
    padded[:, :height, :width] = x
    expected = torch.zeros_like(padded)
    for i in range(0, 8, 4):
        for j in range(0, 12, 4):
            tokens = padded[:, i : i + 4, j : j + 4].reshape(2, 16, 12)
            q, k, v = (y.unflatten(-1, (3, 4)) for y in layer.qkv(tokens).chunk(3, dim=-1))
            out = layer.proj(naive.softmax_attention(q, k, v).flatten(2))
            expected[:, i : i + 4, j : j + 4] = out.reshape(2, 4, 4, 12)
    torch.testing.assert_close(layer(x), expected[:, :height, :width])


@pytest.mark.parametrize("shift", [(0, 0), (2, 1)])
@pytest.mark.parametrize("size", [(1, 1), (4, 9), (7, 5)])
def test_gathered_windows_are_the_partition(size, shift):
    """The form that programs with symbolic sizes get, run plainly."""
    x = torch.randn(3, *size, 2)
    rows, cols = (-(-size[0] // 4), 4), (-(-size[1] // 3), 3)
    windows = gather_windows(x, rows, cols, *shift)
    assert torch.equal(windows, to_windows(x, rows, cols, *shift))
    assert torch.equal(gather_map(windows, rows, cols, (3, *size), *shift), x)
    assert torch.equal(from_windows(windows, rows, cols, (3, *size), *shift), x)


@pytest.mark.compile
def test_compiled_windows_give_the_same_gradients():
    layer, x = PaddedWindowAttention(8, 2, window_size=3), torch.randn(2, 4, 7, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    (expected,) = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x)
    (grad,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(grad, expected)


@pytest.mark.compile
@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(ShiftedWindowAttention(8, 2, 4, shift=True), id="shifted"),
        pytest.param(
            CrossShapedAttention(8, 2, "softmax", 4), id="cross-shaped", marks=pytest.mark.slow
        ),
    ],
)
@torch.no_grad()
def test_compiled_once_for_all_sizes(layer):
    """One window or many, whole ones and not, fewer than 16 and more."""
    counter, args = CompileCounter(), 2 if isinstance(layer, CrossShapedAttention) else 1
    compiled = torch.compile(layer.eval(), backend=counter, fullgraph=True, dynamic=True)
    for size in ((2, 12, 14), (3, 30, 31), (5, 3, 4), (2, 24, 55)):
        x = (torch.randn(*size, 8),) * args
        torch.testing.assert_close(compiled(*x), layer(*x))
    assert counter.frame_count == 1


def test_window_attention_rejects_what_does_not_fit():
    with pytest.raises(ValueError, match="dim 10 does not divide into 3 heads"):
        PaddedWindowAttention(10, 3, 7)
    with pytest.raises(ValueError, match="side of at least 1, got 0"):
        PaddedWindowAttention(12, 3, 0)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        PaddedWindowAttention(12, 3, 7, backend="fast")


@pytest.mark.quick
@pytest.mark.parametrize("attn_type", ANY_LAYER)
@pytest.mark.parametrize("temperature", [False, True])
@pytest.mark.parametrize("backend", ["eager", "library"])
def test_linear_attention(attn_type, temperature, backend):
    layer = LinearAttention(12, 3, attn_type, temperature, backend=backend).double()
    if temperature:
        torch.nn.init.normal_(layer.temperature)
    x = torch.randn(2, 20, 12).double()
    q, k, v = (y.unflatten(-1, (3, 4)) for y in layer.qkv(x).chunk(3, dim=-1))
    out = naive.linear_attention(q, k, v, attn_type, head_scale=layer.temperature)
    expected = layer.proj(out.flatten(2))
    torch.testing.assert_close(layer(x), expected)
    as_map = layer(x.unflatten(1, (4, 5)))
    torch.testing.assert_close(as_map, expected.unflatten(1, (4, 5)))


def test_linear_attention_with_softmax():
    layer = LinearAttention(12, 3, "softmax").double()
    x = torch.randn(2, 20, 12).double()
    q, k, v = (y.unflatten(-1, (3, 4)) for y in layer.qkv(x).chunk(3, dim=-1))
    torch.testing.assert_close(layer(x), layer.proj(naive.softmax_attention(q, k, v).flatten(2)))
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
    with pytest.raises(ValueError, match="softmax attention has no state"):
        LinearAttention(12, 3, "softmax", temperature=True)


def test_linear_attention_rejects_what_does_not_fit():
    with pytest.raises(ValueError, match="dim 10 does not divide into 3 heads"):
        LinearAttention(10, 3, "elu")
    with pytest.raises(ValueError, match="unknown attention mechanism 'xcit'"):
        LinearAttention(12, 3, "xcit")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        LinearAttention(12, 3, "elu", backend="fast")


def test_local_concentration():
    layer, x = LocalConcentration(6).double(), torch.randn(2, 9, 8, 6).double()

    def dw7(conv, x):
        return F.conv2d(x, conv.weight, conv.bias, padding=3, groups=6)

    y = F.gelu(dw7(layer.conv1, x.permute(0, 3, 1, 2)))
    mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
    expected = dw7(layer.conv2, (y - mean) / (var + 1e-5).sqrt()).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer.train()(x), expected)
