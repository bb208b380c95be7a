"""Layers on maps [B, C, H, W]: products with weights as 1x1 convolutions, norms over axis 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """Layer norm over the channels of a map [B, C, H, W], without weight and bias.

    Those are in the products that follow: see `pointwise`.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = x - x.mean(1, keepdim=True)
        return x * ((x * x).mean(1, keepdim=True) + self.eps).rsqrt()


def pointwise(weight: Tensor, bias: Tensor | None, norm: nn.LayerNorm | None = None) -> nn.Conv2d:
    """A 1x1 convolution that is a product with weights, after what a norm multiplies and adds.

    Args:
        weight: [C_out, C_in].
        bias: [C_out]; None for none.
        norm: Its weight and bias become part of the convolution.
    """
    weight = weight.detach().double()
    total = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.detach().double()
    if norm is not None and norm.bias is not None:
        total = total + weight @ norm.bias.detach().double()
    if norm is not None and norm.weight is not None:
        weight = weight * norm.weight.detach().double()
    with_bias = bias is not None or (norm is not None and norm.bias is not None)
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=with_bias)
    with torch.no_grad():
        conv.weight.copy_(weight[:, :, None, None])
        if conv.bias is not None:
            conv.bias.copy_(total)
    return conv.eval()


def convolution(layer: nn.Conv2d) -> nn.Conv2d:
    """A convolution of maps [B, H, W, C] as one of maps [B, C, H, W], with the same parameters."""
    conv = nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
        layer.dilation, layer.groups, layer.bias is not None,
    )  # fmt: skip
    conv.load_state_dict(layer.state_dict())
    return conv.eval()
