"""Attention layers given padding: equal to smaller maps, in Python and in TorchScript."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ops.inputs import ANY_LAYER
from vitlinear.layers import (
    CrossShapedAttention,
    GatedAttention,
    InLineAttention,
    InLineTokenAttention,
    LightNetAttention,
    LinearAttention,
    MilaAttention,
    NormGatedAttention,
    ShiftedWindowAttention,
)
from vitlinear.ops import MECHANISMS, full_width_rotary_tables, lrpe_tables, rotary_tables

DIM, HEADS = 32, 2
FULL = (9, 7)
SIZES = [(9, 7), (5, 6), (9, 1), (1, 7)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def masks(sizes: list[tuple[int, int]]) -> Tensor:
    mask = torch.ones(len(sizes), *FULL, dtype=torch.bool)
    for row, (height, width) in zip(mask, sizes, strict=True):
        row[:height, :width] = False
    return mask


def maps() -> Tensor:
    """[B, H, W, C] with NaN in the padding."""
    x = torch.randn(len(SIZES), *FULL, DIM, dtype=torch.float64)
    return x.masked_fill(masks(SIZES)[..., None], torch.nan)


def modes(layer: nn.Module) -> list[nn.Module]:
    layer = layer.double().eval()
    return [layer, torch.jit.script(layer)]


@pytest.mark.parametrize("attn_type", ["softmax", *ANY_LAYER])
@pytest.mark.parametrize("attention", [GatedAttention, NormGatedAttention])
@torch.no_grad()
def test_gated_attention(attention, attn_type):
    x = maps()
    cosine = attn_type != "softmax" and MECHANISMS[attn_type].positions == "cosine"

    def tables(height, width):
        make = lrpe_tables if cosine else rotary_tables
        return make(height, width, DIM // HEADS, x.device, torch.float64)

    for layer in modes(attention(DIM, HEADS, attn_type)):
        out = layer(x, tables(*FULL), masks(SIZES))
        for y, row, (height, width) in zip(x, out, SIZES, strict=True):
            alone = layer(y[None, :height, :width], tables(height, width))[0]
            torch.testing.assert_close(row[:height, :width], alone, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_mila_attention():
    """Its convolution and its values find zeros in padding."""
    x = maps()

    def tables(height, width):
        return full_width_rotary_tables(height, width, DIM, x.device, torch.float64)

    for layer in modes(MilaAttention(DIM, HEADS)):
        out = layer(x, tables(*FULL), masks(SIZES))
        for y, row, (height, width) in zip(x, out, SIZES, strict=True):
            alone = layer(y[None, :height, :width], tables(height, width))[0]
            torch.testing.assert_close(row[:height, :width], alone, rtol=1e-9, atol=1e-11)


def token_attentions() -> list[nn.Module]:
    return [
        LinearAttention(DIM, HEADS, "l2", temperature=True),
        LinearAttention(DIM, HEADS, "softmax"),
        InLineTokenAttention(DIM, HEADS),
        LightNetAttention(DIM, HEADS),
    ]


@pytest.mark.parametrize("attention", token_attentions(), ids=lambda x: x.__class__.__name__)
@torch.no_grad()
def test_attention_on_rows_of_tokens(attention):
    x, mask = maps(), masks(SIZES).flatten(1)
    for layer in modes(attention):
        out = layer(x.flatten(1, 2), *FULL, mask).unflatten(1, FULL)
        for y, row, (height, width) in zip(x, out, SIZES, strict=True):
            tokens = y[None, :height, :width].flatten(1, 2)
            alone = layer(tokens, height, width).unflatten(1, (height, width))[0]
            torch.testing.assert_close(row[:height, :width], alone, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_linear_attention_on_maps():
    x = maps()
    for layer in modes(LinearAttention(DIM, HEADS, "elu")):
        out = layer(x, key_padding_mask=masks(SIZES))
        for y, row, (height, width) in zip(x, out, SIZES, strict=True):
            alone = layer(y[None, :height, :width])[0]
            torch.testing.assert_close(row[:height, :width], alone, rtol=1e-10, atol=1e-12)


def window_attentions() -> list[nn.Module]:
    return [
        InLineAttention(DIM, HEADS, 4),
        ShiftedWindowAttention(DIM, HEADS, 3, shift=True),
        CrossShapedAttention(DIM, HEADS, "inline", 4),
        CrossShapedAttention(DIM, HEADS, "softmax", 3),
    ]


@pytest.mark.parametrize("attention", window_attentions(), ids=lambda x: x.__class__.__name__)
@torch.no_grad()
def test_attention_in_windows(attention):
    """Each map has windows of its own; padding gets 0."""
    x = maps()
    sources = 2 if isinstance(attention, CrossShapedAttention) else 1
    for layer in modes(attention):
        out = layer(*[x] * sources, valid_sizes=SIZES)
        for y, row, (height, width) in zip(x, out, SIZES, strict=True):
            alone = layer(*[y[None, :height, :width]] * sources)[0]
            alone = F.pad(alone, (0, 0, 0, FULL[1] - width, 0, FULL[0] - height))
            torch.testing.assert_close(row, alone, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_mask_inside_of_windows():
    """Of which each keeps the tokens that are no padding."""
    x = torch.randn(1, 8, 8, DIM, dtype=torch.float64)
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 6:] = True
    for layer in modes(InLineAttention(DIM, HEADS, 4)):
        out = layer(x.masked_fill(mask[..., None], torch.nan), mask)
        torch.testing.assert_close(out[:, :4], layer(x[:, :4]), rtol=1e-10, atol=1e-12)
        parts = [layer(x[:, 4:6, left : left + 4]) for left in (0, 4)]
        torch.testing.assert_close(out[:, 4:6], torch.cat(parts, 2), rtol=1e-10, atol=1e-12)
        assert out.isfinite().all()
