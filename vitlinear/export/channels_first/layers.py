"""Layers on maps [B, C, H, W]: products with weights as 1x1 convolutions, norms over axis 1."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, LayerNorm2d
from torch import Tensor, nn

from vitlinear.layers import (
    ConvMlp,
    DepthwiseConv,
    Linear,
    LocalConcentration,
    Mlp,
    ResidualDepthwiseConv,
    RmsNorm,
    SwiGlu,
    is_exact_gelu,
    is_plain,
)
from vitlinear.layers.attention.cross_shaped_attention import WindowConv
from vitlinear.layers.layout import known_strides
from vitlinear.models._hosts import MapMerging


class MapSize(NamedTuple):
    """The size of all maps that a layer will see.

    Attributes:
        batch: None where it varies.
        channels: C.
        height: H.
        width: W.
        dtype: Of the map.
    """

    batch: int | None
    channels: int
    height: int
    width: int
    dtype: torch.dtype

    def example(self) -> Tensor:
        """A map of this size."""
        return torch.zeros(self.batch or 1, *self[1:4], dtype=self.dtype)


class NoForm(Exception):
    """A layer has no form on maps [B, C, H, W]; the message names it."""


def require(module: nn.Module, *kinds: type[nn.Module]) -> None:
    """Raises `NoForm` unless the module is of exactly one of these classes, and plain."""
    if not is_plain(module, *kinds):
        raise NoForm(type(module).__name__)


def require_gelu(module: nn.Module) -> None:
    """Raises `NoForm` unless the module is a GELU, and the exact one."""
    require(module, nn.GELU)
    if not is_exact_gelu(module):
        raise NoForm("GELU that is approximated")


def require_norm(norm: nn.Module, *kinds: type[nn.Module]) -> None:
    """Raises `NoForm` unless `require` lets the norm pass, and it has all that its class may have.

    What a norm multiplies and adds becomes part of other layers.
    """
    require(norm, *kinds)
    if norm.weight is None or getattr(norm, "bias", norm.weight) is None:
        raise NoForm(f"{type(norm).__name__} without weight or bias")


def require_nothing(*modules: nn.Module) -> None:
    """Raises `NoForm` unless inference goes through these modules as through nothing."""
    for module in modules:
        require(module, nn.Identity, nn.Dropout, DropPath)


def channel_mean(x: Tensor) -> Tensor:
    """Mean over channels, [..., C, N] -> [..., 1, N], as a product with C equal weights."""
    channels = x.shape[-2]
    return x.new_full((*x.shape[:-2], 1, channels), 1.0 / channels) @ x


class ChannelNorm(nn.Module):
    """Layer norm over the channels of a map [B, C, H, W], without weight and bias.

    Those are in the products that follow: see `pointwise`.

    Attributes:
        by_products: Means are products, see `channel_mean`.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.by_products = True

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = known_strides(x)
        if self.by_products:
            y = x.flatten(2)
            y = y - channel_mean(y)
            return (y * (channel_mean(y * y) + self.eps).rsqrt()).reshape(x.shape)
        x = x - x.mean(1, keepdim=True)
        return x * ((x * x).mean(1, keepdim=True) + self.eps).rsqrt()


class ChannelRmsNorm(nn.Module):
    """RMS norm over the channels of a map [B, C, H, W], or over those of each head.

    Its weight is in the products that follow.

    Attributes:
        by_products: As those of `ChannelNorm`.
    """

    def __init__(self, eps: float, num_heads: int = 1) -> None:
        super().__init__()
        self.eps = eps
        self.num_heads = num_heads
        self.by_products = True

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        y = x.unflatten(1, (self.num_heads, -1)) if self.num_heads > 1 else x
        axis = y.ndim - 3
        if self.by_products:
            y = y.flatten(-2)
            mean = channel_mean(y * y)
        else:
            mean = (y * y).mean(axis, keepdim=True)
        return (y * (mean + self.eps).rsqrt()).reshape(x.shape)


class Affine(nn.Module):
    """The weight and the bias of a norm on a map [B, C, H, W]."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        """Take the parameters over."""
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach()[:, None, None].clone())
        self.bias = nn.Parameter(norm.bias.detach()[:, None, None].clone())

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return x * self.weight + self.bias


def norm_of(norm: nn.Module) -> nn.Module:
    """A norm over channels without weight and bias, which the next products take."""
    require_norm(norm, LayerNorm, RmsNorm)
    if isinstance(norm, RmsNorm):
        return ChannelRmsNorm(norm.eps)
    return ChannelNorm(norm.eps)


def affine_channel_norm(norm: nn.Module) -> nn.Module:
    """Layer norm over the channels of a map [B, C, H, W], with weight and bias."""
    require_norm(norm, LayerNorm, LayerNorm2d)
    assert isinstance(norm, nn.LayerNorm)
    return nn.Sequential(ChannelNorm(norm.eps), Affine(norm))


class Pointwise(nn.Conv2d):
    """A 1x1 convolution that is a product with weights, and can be traced as one.

    Attributes:
        large_map: Bytes of the map of one image from which on the map is a factor of a matrix
            product; None for a convolution whatever the size.
    """

    large_map: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H, W]."""
        large = self.large_map
        if large is None or math.prod(x.shape[1:]) * x.element_size() < large:
            return super().forward(x)
        out = self.weight.flatten(1) @ x.flatten(2)
        if self.bias is not None:
            out = out + self.bias[:, None]
        return out.unflatten(2, x.shape[2:])


def pointwise(weight: Tensor, bias: Tensor | None, norm: nn.Module | None = None) -> Pointwise:
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
    shift = getattr(norm, "bias", None)  # an RMS norm has none
    if shift is not None:
        total = total + weight @ shift.detach().double()
    if norm is not None:
        weight = weight * norm.weight.detach().double()
    with_bias = bias is not None or shift is not None
    conv = Pointwise(weight.shape[1], weight.shape[0], 1, bias=with_bias, dtype=dtype)
    with torch.no_grad():
        conv.weight.copy_(weight[:, :, None, None])
        if conv.bias is not None:
            conv.bias.copy_(total)
    return conv.eval()


def convolution(layer: nn.Module) -> nn.Module:
    """A depthwise convolution of maps [B, H, W, C] as one of [B, C, H, W], the same parameters."""
    require(layer, DepthwiseConv, ResidualDepthwiseConv, WindowConv)
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


def linear(layer: nn.Module, norm: nn.Module | None = None) -> nn.Conv2d:
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
            require_gelu(mlp.act)
        else:
            require_nothing(mlp.act)
        self.act = nn.GELU()
        self.dwconv: nn.Module = nn.Identity()
        self.second_act: nn.Module = nn.Identity()
        if isinstance(mlp, ConvMlp):
            require_nothing(mlp.drop)
            self.dwconv = convolution(mlp.dwconv)
            if mlp.act2 is not None:
                require_gelu(mlp.act2)
                self.second_act = nn.GELU()
        else:
            require_nothing(mlp.drop1, mlp.drop2)
        self.fc2 = linear(mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; x without what its norm multiplies and adds."""
        return self.fc2(self.second_act(self.dwconv(self.act(self.fc1(x)))))


class ChannelsFirstSwiGlu(nn.Module):
    """`SwiGlu` on a map [B, C, H, W]."""

    def __init__(self, mlp: nn.Module, norm: nn.Module) -> None:
        """Take the parameters over; as `ChannelsFirstMlp`."""
        super().__init__()
        require(mlp, SwiGlu)
        require(mlp.act, nn.SiLU)
        require_nothing(mlp.drop1, mlp.drop2)
        self.gate, self.value = linear(mlp.fc1_g, norm), linear(mlp.fc1_x, norm)
        self.fc2 = linear(mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; x without what its norm multiplies."""
        return self.fc2(nn.functional.silu(self.gate(x)) * self.value(x))


class ChannelsFirstConcentration(nn.Module):
    """`LocalConcentration` on a map [B, C, H, W]."""

    def __init__(self, lcm: nn.Module) -> None:
        """Take the parameters over."""
        super().__init__()
        require(lcm, LocalConcentration)
        require_gelu(lcm.act)
        require(lcm.bn, nn.BatchNorm2d)
        self.steps = nn.Sequential(
            convolution(lcm.conv1), nn.GELU(), lcm.bn, convolution(lcm.conv2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return self.steps(x)


class ChannelsFirstMerging(nn.Module):
    """`MapMerging` with one copy of the map: neighbours become channels."""

    def __init__(self, merging: nn.Module) -> None:
        """Take the parameters over."""
        super().__init__()
        require(merging, MapMerging)
        assert isinstance(merging, MapMerging)
        self.norm = norm_of(merging.norm)
        self.reduction = linear(merging.reduction, merging.norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 2 C, ceil(H / 2), ceil(W / 2)], zeros beyond an odd side."""
        height, width = (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2
        x = F.pad(x, (0, 2 * width - x.shape[3], 0, 2 * height - x.shape[2]))
        x = x.unflatten(3, (width, 2)).unflatten(2, (height, 2))
        return self.reduction(self.norm(x.permute(0, 5, 3, 1, 2, 4).flatten(1, 3)))
