"""Layers against their definitions in plain tensor operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ops.inputs import ANY_LAYER
from vitlinear import ops
from vitlinear.layers import ConvMlp, ConvStem, DepthwiseConv, GatedAttention
from vitlinear.ops import naive


def nchw(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.quick
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_depthwise_conv(kernel_size):
    layer, x = DepthwiseConv(6, kernel_size).double(), torch.randn(2, 5, 7, 6).double()
    expected = F.conv2d(nchw(x), layer.weight, layer.bias, padding=kernel_size // 2, groups=6)
    torch.testing.assert_close(nchw(layer(x)), expected)


def test_depthwise_conv_stays_channels_last():
    out = DepthwiseConv(8, 3)(torch.randn(2, 5, 7, 8))
    assert out.is_contiguous()


@pytest.mark.quick
def test_conv_mlp():
    layer, x = ConvMlp(6, 10).double(), torch.randn(2, 5, 7, 6).double()
    y = F.gelu(x @ layer.fc1.weight.T + layer.fc1.bias)
    conv = layer.dwconv
    local = F.conv2d(y.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=1, groups=10)
    y = y + local.permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), y @ layer.fc2.weight.T + layer.fc2.bias)


@pytest.mark.parametrize("size", [(32, 32), (33, 46), (3, 1)])
def test_conv_stem_quarters_any_size(size):
    out = ConvStem(3, 8)(torch.randn(2, 3, *size))
    assert out.shape == (2, 8, -(-size[0] // 4), -(-size[1] // 4))
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.quick
@pytest.mark.parametrize("attn_type", [*ANY_LAYER, "softmax"])
@pytest.mark.parametrize("backend", ["eager", "library"])
def test_gated_attention(attn_type, backend):
    dim, heads, height, width = 24, 3, 4, 5
    layer = GatedAttention(dim, heads, attn_type, backend=backend).double()
    x = torch.randn(2, height, width, dim).double()
    make_tables = ops.lrpe_tables if attn_type == "lightnet" else ops.rotary_tables
    rotary = make_tables(height, width, dim // heads, dtype=torch.float64)
    assert (layer.temperature is not None) == (attn_type == "l2")
    if layer.temperature is not None:
        assert layer.temperature.tolist() == pytest.approx([8**-0.5] * heads)
        torch.nn.init.normal_(layer.temperature)

    q, k, v, o = (x.flatten(1, 2) @ layer.qkvo.weight.T + layer.qkvo.bias).chunk(4, dim=-1)
    lepe = layer.lepe(v.unflatten(1, (height, width))).flatten(1, 2)
    q, k, v = (y.unflatten(-1, (heads, -1)) for y in (q, k, v))
    if attn_type == "softmax":
        out = naive.softmax_attention(q, k, v, rotary)
    else:
        out = naive.linear_attention(q, k, v, attn_type, rotary, head_scale=layer.temperature)
    out = ((out.flatten(2) + lepe) * o) @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer(x, rotary), out.unflatten(1, (height, width)))


def test_gated_attention_rejects_what_does_not_fit():
    with pytest.raises(ValueError, match="dim 30 does not divide into 3 heads"):
        GatedAttention(30, 3, "rala")
    with pytest.raises(ValueError, match="unknown attention mechanism 'xcit'"):
        GatedAttention(24, 3, "xcit")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        GatedAttention(24, 3, "rala", backend="fast")
