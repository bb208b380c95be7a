"""Layers on maps [B, C, H, W]: products with weights as 1x1 convolutions, norms over axis 1."""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vitlinear.layers import ConvMlp, DepthwiseConv, Linear, Mlp, ResidualDepthwiseConv, is_plain


class NoForm(Exception):
    """A layer has no form on maps [B, C, H, W]; the message names it."""


def require(module: nn.Module, *kinds: type[nn.Module]) -> None:
    """Raises `NoForm` unless the module is of exactly one of these classes, and plain."""
    if not is_plain(module, *kinds):
        raise NoForm(type(module).__name__)


def require_nothing(*modules: nn.Module) -> None:
    """Raises `NoForm` unless inference goes through these modules as through nothing."""
    for module in modules:
        require(module, nn.Identity, nn.Dropout, DropPath)


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


class AffineChannelNorm(ChannelNorm):
    """Layer norm over the channels of a map [B, C, H, W], with weight and bias."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        """Take the parameters over."""
        super().__init__(norm.eps)
        self.weight = nn.Parameter(norm.weight.detach()[:, None, None].clone())
        self.bias = nn.Parameter(norm.bias.detach()[:, None, None].clone())

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return super().forward(x) * self.weight + self.bias


def pointwise(weight: Tensor, bias: Tensor | None, norm: nn.LayerNorm | None = None) -> nn.Conv2d:
    """A 1x1 convolution that is a product with weights, after what a norm multiplies and adds.

    Args:
        weight: [C_out, C_in].
        bias: [C_out]; None for none.
        norm: Its weight and bias become part of the convolution.
    """
    dtype, weight = weight.dtype, weight.detach().double()
    total = (
        torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.detach().double()
    )
    if norm is not None and norm.bias is not None:
        total = total + weight @ norm.bias.detach().double()
    if norm is not None and norm.weight is not None:
        weight = weight * norm.weight.detach().double()
    with_bias = bias is not None or (norm is not None and norm.bias is not None)
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=with_bias, dtype=dtype)
    with torch.no_grad():
        conv.weight.copy_(weight[:, :, None, None])
        if conv.bias is not None:
            conv.bias.copy_(total)
    return conv.eval()


def convolution(layer: nn.Module) -> nn.Module:
    """A depthwise convolution of maps [B, H, W, C] as one of [B, C, H, W], the same parameters."""
    require(layer, DepthwiseConv, ResidualDepthwiseConv)
    assert isinstance(layer, DepthwiseConv)
    if isinstance(layer, ResidualDepthwiseConv):
        layer = layer.fuse()
        assert isinstance(layer, DepthwiseConv)
    conv = nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
        layer.dilation, layer.groups, layer.bias is not None, dtype=layer.weight.dtype,
    )  # fmt: skip
    conv.load_state_dict(layer.state_dict())
    return conv.eval()


def linear(layer: nn.Module, norm: nn.LayerNorm | None = None) -> nn.Conv2d:
    """A linear layer as a 1x1 convolution; whoever calls this sees to its activation.

    Args:
        layer: Ours, or PyTorch's.
        norm: See `pointwise`.
    """
    require(layer, Linear, nn.Linear)
    assert isinstance(layer, nn.Linear)
    return pointwise(layer.weight, layer.bias, norm)


class ChannelsFirstMlp(nn.Module):
    """`ConvMlp` or `Mlp` on a map [B, C, H, W]."""

    def __init__(self, mlp: nn.Module, norm: nn.LayerNorm) -> None:
        """Take the parameters over.

        Args:
            mlp: The network.
            norm: The norm before it, whose weight and bias become part of it.
        """
        super().__init__()
        require(mlp, ConvMlp, Mlp)
        self.fc1 = linear(mlp.fc1, norm)
        if getattr(mlp.fc1, "activation", "none") == "none":
            require(mlp.act, nn.GELU)
        self.act = nn.GELU()
        self.dwconv: nn.Module = nn.Identity()
        self.second_act: nn.Module = nn.Identity()
        if isinstance(mlp, ConvMlp):
            require_nothing(mlp.drop)
            self.dwconv = convolution(mlp.dwconv)
            if mlp.act2 is not None:
                require(mlp.act2, nn.GELU)
                self.second_act = nn.GELU()
        else:
            require_nothing(mlp.drop1, mlp.drop2)
        self.fc2 = linear(mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; x without what its norm multiplies and adds."""
        return self.fc2(self.second_act(self.dwconv(self.act(self.fc1(x)))))
