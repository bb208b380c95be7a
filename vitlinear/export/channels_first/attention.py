"""Attention layers on maps [B, C, H, W], made from those of a model."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

from vitlinear.layers import (
    GatedAttention,
    HeadRmsNorm,
    InputValueAttention,
    LightNetAttention,
    Linear,
    LinearAttention,
    MilaAttention,
    NormGatedAttention,
)

from .formula import Parts, attention, is_covered
from .layers import (
    ChannelRmsNorm,
    MapSize,
    NoForm,
    affine_channel_norm,
    convolution,
    linear,
    pointwise,
    require,
    require_nothing,
)
from .positions import Angles


def check_covered(name: str) -> str:
    """Returns the name of an attention that `formula.attention` knows; raises `NoForm`."""
    if not is_covered(name):
        raise NoForm(f"attention {name}")
    return name


class Slots:
    """The rows of a linear layer that gives queries, keys and so on, as products of their own."""

    def __init__(
        self,
        layer: nn.Module,
        count: int,
        num_heads: int,
        norm: nn.Module | None,
        outputs: slice = slice(None),
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """Note the layer.

        Args:
            layer: Gives [..., count * num_heads * D].
            count: Of queries, keys and so on.
            num_heads: h.
            norm: The norm before the layer, which becomes part of the products; None for none.
            outputs: Those of the layer that are meant, if it gives more.
            part: Which one of how many parts of the heads is meant, with `num_heads` each.
        """
        require(layer, Linear, nn.Linear)
        assert isinstance(layer, nn.Linear)

        def heads(x: Tensor) -> Tensor:
            index, parts = part
            return x.detach()[outputs].unflatten(0, (count, parts, num_heads, -1))[:, index]

        self.weight, self.norm = heads(layer.weight), norm
        self.bias = None if layer.bias is None else heads(layer.bias)

    def rows(self, slot: int, step: slice = slice(None)) -> nn.Conv2d:
        """The product of one slot, with all channels of the heads or with some."""
        bias = None if self.bias is None else self.bias[slot, :, step].flatten()
        return pointwise(self.weight[slot, :, step].flatten(0, 1), bias, self.norm)

    def pair(self, slot: int) -> nn.ModuleList:
        """The products with even and with odd channels."""
        return nn.ModuleList(self.rows(slot, slice(i, None, 2)) for i in (0, 1))


def heads_of(x: Tensor, num_heads: int) -> Tensor:
    """[B, h D, H, W] -> [B, h, D, N]."""
    return x.reshape(x.shape[0], num_heads, x.shape[1] // num_heads, x.shape[2] * x.shape[3])


def parts_of(x: Tensor, products: nn.ModuleList, num_heads: int) -> Parts:
    """Heads in parts, [B, h, D', N] each, of a map [B, C, H, W]."""
    return tuple(heads_of(product(x), num_heads) for product in products)


class ChannelsFirstGatedAttention(nn.Module):
    """`GatedAttention` or `NormGatedAttention` on a map [B, C, H, W]."""

    def __init__(self, attn: nn.Module, norm: nn.Module, size: MapSize | None) -> None:
        """Take the parameters over.

        Args:
            attn: The layer.
            norm: The norm before it, whose weight and bias become part of the products.
            size: Of the map; None where it varies. The layer is the same at any.
        """
        super().__init__()
        require(attn, GatedAttention, NormGatedAttention)
        assert isinstance(attn, GatedAttention)
        require_nothing(attn.proj_drop)
        self.num_heads = attn.num_heads
        self.attn_type = check_covered(attn.attn_type)
        slots = Slots(attn.qkvo, 4, attn.num_heads, norm)
        if attn.attn_type == "lightnet":  # its positions turn no pairs
            self.q, self.k = (nn.ModuleList((slots.rows(i),)) for i in (0, 1))
        else:
            self.q, self.k = slots.pair(0), slots.pair(1)
        self.v, self.o = slots.rows(2), slots.rows(3)
        self.lepe = convolution(attn.lepe)
        self.temperature = attn.temperature
        self.norm: nn.Module | None = None
        if isinstance(attn, NormGatedAttention):
            self.norm = affine_channel_norm(attn.norm)
        self.proj = linear(attn.proj)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; x without what its norm multiplies and adds."""
        q, k = (parts_of(x, products, self.num_heads) for products in (self.q, self.k))
        values = self.v(x)
        v = heads_of(values, self.num_heads)
        out = attention(q, k, v, self.attn_type, angles, self.temperature)
        out = out.reshape(values.shape) + self.lepe(values)
        gate = self.o(x)
        if self.norm is not None:
            out, gate = self.norm(out), silu(gate)
        return self.proj(out * gate)


class ChannelsFirstLinearAttention(nn.Module):
    """`LinearAttention` on a map [B, C, H, W]."""

    def __init__(self, attn: LinearAttention, norm: nn.Module, size: MapSize | None) -> None:
        """Take the parameters over; arguments as `ChannelsFirstGatedAttention`."""
        super().__init__()
        require_nothing(attn.proj_drop)
        self.num_heads = attn.num_heads
        self.attn_type = check_covered(attn.attn_type)
        slots = Slots(attn.qkv, 3, attn.num_heads, norm)
        self.q, self.k, self.v = (slots.rows(i) for i in range(3))
        self.temperature = attn.temperature
        self.proj = linear(attn.proj)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; x without what its norm multiplies and adds."""
        q, k, v = (heads_of(product(x), self.num_heads) for product in (self.q, self.k, self.v))
        out = attention((q,), (k,), v, self.attn_type, None, self.temperature)
        return self.proj(out.reshape(x.shape))


class ChannelsFirstMilaAttention(nn.Module):
    """`MilaAttention` on a map [B, C, H, W]."""

    def __init__(self, attn: MilaAttention, norm: nn.Module, size: MapSize | None) -> None:
        """Take the parameters over; arguments as `ChannelsFirstGatedAttention`."""
        super().__init__()
        require_nothing(attn.proj_drop)
        require(attn.act, nn.SiLU)
        require(attn.gate_act, nn.SiLU)
        inner = attn.attend
        require(inner, InputValueAttention)
        self.num_heads = inner.num_heads
        self.attn_type = check_covered(inner.attn_type)
        self.in_proj, self.gate_proj = linear(attn.in_proj, norm), linear(attn.gate_proj, norm)
        self.dwconv = convolution(attn.dwconv)
        slots = Slots(inner.qk, 2, inner.num_heads, None)
        self.q, self.k = slots.pair(0), slots.pair(1)
        self.lepe = convolution(inner.lepe)
        self.proj = linear(attn.proj)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; x without what its norm multiplies and adds."""
        u = silu(self.dwconv(self.in_proj(x)))
        q, k = (parts_of(u, products, self.num_heads) for products in (self.q, self.k))
        out = attention(q, k, heads_of(u, self.num_heads), self.attn_type, angles)
        out = out.reshape(u.shape) + self.lepe(u)
        return self.proj(out * silu(self.gate_proj(x)))


class ChannelsFirstLightNetAttention(nn.Module):
    """`LightNetAttention` on tokens [B, C, 1, N]."""

    def __init__(self, attn: LightNetAttention, norm: nn.Module, size: MapSize | None) -> None:
        """Take the parameters over; arguments as `ChannelsFirstGatedAttention`."""
        super().__init__()
        require_nothing(attn.proj_drop)
        require(attn.norm, HeadRmsNorm)
        self.num_heads = attn.num_heads
        slots = Slots(attn.qkv, 3, attn.num_heads, norm)
        self.q, self.k, self.v = (slots.rows(i) for i in range(3))
        self.norm = ChannelRmsNorm(attn.norm.norm.eps, attn.num_heads)
        self.gate = nn.Sequential(linear(attn.gate1, norm), linear(attn.gate2), nn.Sigmoid())
        self.proj = linear(attn.proj, attn.norm)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """[B, C, 1, N] -> [B, C, 1, N]; x without what its norm multiplies."""
        q, k, v = (heads_of(product(x), self.num_heads) for product in (self.q, self.k, self.v))
        out = attention((q,), (k,), v, "lightnet", angles).reshape(x.shape)
        return self.proj(self.norm(out) * self.gate(x))
