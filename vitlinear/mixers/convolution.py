"""Depthwise convolutions of the map of a grid, in the type of the tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vitlinear.layers.band import band_in_use
from vitlinear.layers.conv.depthwise_conv import DepthwiseConv

from .grid import Grid


def convolved(conv: DepthwiseConv, x: Tensor) -> Tensor:
    """A convolution of a map [B, H, W, ...] whose last axes are channels, zeros around it.

    In the type of the map, which may be wider than that of the parameters.
    """
    if x.dtype == conv.weight.dtype or band_in_use() is not None:
        # The module itself, which those who split rows over processes have to see.
        return conv(x.flatten(3).to(conv.weight.dtype)).to(x.dtype).reshape(x.shape)
    image = x.flatten(3).permute(0, 3, 1, 2)
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    out = F.conv2d(image, conv.weight.to(x.dtype), bias, 1, conv.padding, 1, conv.groups)
    return out.permute(0, 2, 3, 1).reshape(x.shape)


def convolved_tokens(conv: DepthwiseConv, x: Tensor, grid: Grid) -> Tensor:
    """Tokens [B, N, h, D] whose map is convolved; those before it stay as they are."""
    prefix, tokens = grid.split(x)
    return grid.join(prefix, convolved(conv, tokens))


def local_values(conv: DepthwiseConv, v: Tensor, grid: Grid) -> Tensor:
    """The convolution of the values of the map, [B, N, h, D]; 0 for tokens before it."""
    prefix, tokens = grid.split(v)
    return grid.join(prefix * 0, convolved(conv, tokens))


def naive_convolution(conv: DepthwiseConv, x: Tensor) -> Tensor:
    """`convolved` tap by tap."""
    side = conv.kernel_size[0]
    channels, reach = x.flatten(3), side // 2
    padded = F.pad(channels, (0, 0, reach, reach, reach, reach))
    out = channels * 0 if conv.bias is None else channels * 0 + conv.bias
    for row in range(side):
        for col in range(side):
            moved = padded[:, row : row + x.shape[1], col : col + x.shape[2]]
            out = out + moved * conv.weight[:, 0, row, col]
    return out.reshape(x.shape)
