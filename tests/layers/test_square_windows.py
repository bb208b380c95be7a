"""Square windows of released Swin transformers, and a convolution that all heads share."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitlinear.layers.attention.shifted_window_attention import (
    ShiftedWindowAttention,
    resized_biases,
)
from vitlinear.layers.conv.depthwise_conv import DepthwiseConv
from vitlinear.layers.conv.head_shared_conv import HeadSharedConv
from vitlinear.layers.windows import square_windows, to_windows, window_padding


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module)


@pytest.mark.parametrize("size, expected", [
    ((56, 56), ((1, 56), (1, 56), 0)), ((56, 112), ((1, 56), (2, 56), 0)),
    ((28, 56), ((1, 28), (2, 28), 0)), ((112, 112), ((2, 56), (2, 56), 28)),
    ((112, 57), ((2, 56), (2, 56), 28)), ((1, 3), ((1, 1), (3, 1), 0)),
])  # fmt: skip
def test_square_windows(size, expected):
    assert square_windows(*size, 56, True) == expected
    assert square_windows(*size, 56, False) == (*expected[:2], 0)


def neighbours(size: tuple[int, int], limit: int, shift: bool) -> Tensor:
    """Which tokens see each other in shifted windows that do not wrap, [N, N]."""
    side = min(limit, *size)
    offset = limit // 2 if shift and min(size) > limit else 0
    row, col = (
        torch.arange(size[0]).repeat_interleave(size[1]),
        torch.arange(size[1]).repeat(size[0]),
    )
    window = torch.stack([(row - offset) // side, (col - offset) // side], 1)
    return (window[:, None] == window).all(2)


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (5, 9), (4, 9), (1, 1), (3, 2), (17, 6)])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("table_size", [4, 3])
def test_softmax(size, shift, table_size):
    """Over all pairs of tokens: cyclic shifts and padding are only a way to compute it."""
    (H, W), limit, heads, dim = size, 4, 2, 8
    layer = ShiftedWindowAttention(
        dim, heads, limit, shift=shift, square=True, table_size=table_size
    ).double()
    table = torch.nn.init.normal_(layer.rel_pos.relative_position_bias_table)
    side, length = min(limit, H, W), 2 * table_size - 1
    if side != table_size:
        table = table.T.reshape(1, heads, length, length)
        wanted = (2 * side - 1, 2 * side - 1)
        table = F.interpolate(table, wanted, mode="bicubic", align_corners=False)
        table = table[0].flatten(1).T
    x = torch.randn(2, H, W, dim).double()
    q, k, v = layer.qkv(x.flatten(1, 2)).reshape(2, H * W, 3, heads, -1).permute(2, 0, 3, 1, 4)
    row, col = torch.arange(H).repeat_interleave(W), torch.arange(W).repeat(H)
    seen = neighbours(size, limit, shift)
    index = (row[:, None] - row + side - 1) * (2 * side - 1) + col[:, None] - col + side - 1
    bias = table[index.masked_fill(~seen, 0)].permute(2, 0, 1)
    logits = q @ k.transpose(-1, -2) * (dim // heads) ** -0.5 + bias
    out = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    expected = layer.proj(out.transpose(1, 2).flatten(2)).unflatten(1, size)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(scripted(layer)(x), expected)
    grads = [
        torch.autograd.grad(y.square().sum(), layer.parameters()) for y in (layer(x), expected)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_biases_of_the_same_window_are_those_of_the_table():
    layer = ShiftedWindowAttention(8, 2, 5).double()
    biases = resized_biases(layer.rel_pos.relative_position_bias_table, 5, 5)
    torch.testing.assert_close(biases, layer.rel_pos.get_bias()[0])


@pytest.mark.parametrize("masked", [False, True])
def test_padding_moves_with_shifted_windows(masked):
    x = torch.randn(2, 9, 10, 1)
    rows, cols, shift = square_windows(9, 10, 4, True)
    mask = torch.rand(2, 9, 10) < 0.3 if masked else torch.zeros(2, 9, 10, dtype=torch.bool)
    marked = x.abs().masked_fill(mask[..., None], 0)
    windows = to_windows(marked, rows, cols, shift, shift)
    padding = window_padding(x, rows, cols, mask if masked else None, shift, shift)
    assert shift == 2 and torch.equal(padding, windows[..., 0] == 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_convolution_that_heads_share(dtype):
    layer = HeadSharedConv(3, 4, 5).to(dtype)
    each = DepthwiseConv(3, 5).to(dtype)
    each.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 7, 12, dtype=dtype)
    expected = torch.cat([each(head) for head in x.chunk(4, -1)], -1)
    fused = layer.fuse()
    assert isinstance(fused, DepthwiseConv) and fused.weight.shape == (12, 1, 5, 5)
    for form in (layer, fused, scripted(layer)):
        torch.testing.assert_close(form(x), expected)
    found = torch.autograd.grad(layer(x).square().sum(), layer.parameters())
    wanted = torch.autograd.grad(expected.square().sum(), each.parameters())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
