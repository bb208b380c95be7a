"""Stem and downsampling of MILA and H-ViT³ against their definitions, in both forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear.layers import ConvNormAct, InvertedDownsample, InvertedStem

SIZES = [(13, 10), (12, 9), (1, 6), (7, 7), (2, 5)]
FULL = (13, 10)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def in_use(layer: nn.Module, pads_odd_maps: bool) -> nn.Module:
    """None of its parts without effect."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    layer.pads_odd_maps = pads_odd_maps
    return layer.double().eval()


def conv_norm(x: Tensor, layer: ConvNormAct, stride: int = 1) -> Tensor:
    conv, bn = layer.conv, layer.bn
    x = F.conv2d(x, conv.weight, conv.bias, stride, conv.weight.shape[-1] // 2)
    x = (x - bn.running_mean[:, None, None]) / (bn.running_var[:, None, None] + 1e-5).sqrt()
    return x * bn.weight[:, None, None] + bn.bias[:, None, None]


def stem(layer: InvertedStem, x: Tensor) -> Tensor:
    if layer.pads_odd_maps:
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
    x = conv_norm(x, layer.conv1, 2).relu()
    y = conv_norm(conv_norm(x, layer.conv2).relu(), layer.conv3)
    x = x + y if layer.residual else y.relu()
    return conv_norm(conv_norm(x, layer.conv4, 2).relu(), layer.conv5)


def downsample(layer: InvertedDownsample, x: Tensor) -> Tensor:
    if layer.pads_odd_maps:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    x = F.conv2d(x, layer.conv1.weight, layer.conv1.bias).relu()
    conv = layer.conv2
    x = F.conv2d(x, conv.weight, conv.bias, 2, 1, groups=x.shape[1]).relu()
    return conv_norm(x, layer.conv3)


each_form = pytest.mark.parametrize("pads_odd_maps", [False, True])
each_layer = pytest.mark.parametrize(
    ("make", "definition", "channels", "stride"),
    [
        (lambda: InvertedStem(3, 8, residual=True), stem, 3, 4),
        (lambda: InvertedStem(3, 8, residual=False), stem, 3, 4),
        (lambda: InvertedDownsample(6, 8), downsample, 6, 2),
    ],
    ids=["residual stem", "stem", "downsample"],
)


@each_form
@each_layer
def test_definition_at_any_size(make, definition, channels, stride, pads_odd_maps):
    layer = in_use(make(), pads_odd_maps)
    for height, width in SIZES:
        x = torch.randn(2, channels, height, width).double()
        out = layer(x)
        assert out.shape == (2, 8, -(-height // stride), -(-width // stride))
        torch.testing.assert_close(out, definition(layer, x), rtol=1e-12, atol=1e-12)


@each_layer
def test_forms_differ_where_a_side_is_odd(make, definition, channels, stride):
    layer = in_use(make(), True)
    for size, equal in (((16, 8), True), ((16, 9), False), ((13, 8), False)):
        x = torch.randn(2, channels, *size).double()
        layer.pads_odd_maps = True
        dense = layer(x)
        layer.pads_odd_maps = False
        assert torch.equal(layer(x), dense) == equal


@each_form
@each_layer
@torch.no_grad()
def test_padding_is_as_if_it_was_not_there(make, definition, channels, stride, pads_odd_maps):
    """NaN in it, too; in Python and in TorchScript."""
    layer = in_use(make(), pads_odd_maps)
    mask = torch.ones(len(SIZES), *FULL, dtype=torch.bool)
    for row, (height, width) in zip(mask, SIZES, strict=True):
        row[:height, :width] = False
    x = torch.randn(len(SIZES), channels, *FULL).double()
    x = x.masked_fill(mask[:, None], torch.nan)
    for run in (layer, torch.jit.script(layer)):
        out = run(x, mask)
        for y, row, (height, width) in zip(x, out, SIZES, strict=True):
            alone = layer(y[None, :, :height, :width])[0]
            row = row[:, : alone.shape[1], : alone.shape[2]]
            torch.testing.assert_close(row, alone, rtol=1e-12, atol=1e-12)


@each_form
@each_layer
@torch.no_grad()
def test_fused(make, definition, channels, stride, pads_odd_maps):
    """`ConvNormAct` inside folds its batch norm."""
    layer = in_use(make(), pads_odd_maps)
    x = torch.randn(2, channels, *FULL).double()
    expected = layer(x)
    for name, child in list(layer.named_children()):
        if isinstance(child, ConvNormAct):
            setattr(layer, name, child.fuse())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in layer.modules())
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
