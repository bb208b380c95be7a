"""ViT³'s attention on maps [B, C, H, W]: states and reads as products, without a concatenation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from vitlinear.layers.attention.ttt_attention import TttAttention

from .attention import Slots, heads_of, parts_of
from .conv import conv_per_sample, neighbours
from .formula import Parts, rotate
from .layers import MapSize, linear, pointwise, require, require_nothing
from .positions import Angles


def _stepped(weights: Parts, states: Parts) -> Parts:
    """`vitlinear.ops.inner_step.stepped` of matrices in parts, with norms over the last axis."""
    steps = [state * (1 / 3) for state in states]
    square = (steps[0] * steps[0]).sum(-1, keepdim=True)
    for step in steps[1:]:
        square = square + (step * step).sum(-1, keepdim=True)
    factor = (square.sqrt() + 1).reciprocal()
    return tuple(w + step * factor for w, step in zip(weights, steps, strict=True))


def _read(weights: Parts, x: Parts) -> Tensor:
    """Sum over the parts of W x, [B or 1, h, D, D'] and [B, h, D', N] -> [B, h, D, N]."""
    out = weights[0] @ x[0]
    for w, part in zip(weights[1:], x[1:], strict=True):
        out = out + w @ part
    return out


class ChannelsFirstTttAttention(nn.Module):
    """`TttAttention` on a map [B, C, H, W]."""

    def __init__(self, attn: nn.Module, norm: nn.Module, size: MapSize | None) -> None:
        """Take the parameters over.

        Args:
            attn: The layer.
            norm: The norm before it, whose weight and bias become part of the products.
            size: Of the map; None where it varies.
        """
        super().__init__()
        require(attn, TttAttention)
        assert isinstance(attn, TttAttention)
        require_nothing(attn.proj_drop)
        self.num_heads, width = attn.num_heads, attn.head_dim
        self.batch = None if size is None else size.batch
        dim = self.num_heads * width
        of_heads = Slots(attn.qkv, 3, self.num_heads, norm, slice(3 * dim))
        of_conv = Slots(attn.qkv, 3, 1, norm, slice(3 * dim, None))
        self.q, self.k, self.v = of_heads.pair(0), of_heads.pair(1), of_heads.rows(2)
        self.conv_q, self.conv_k, self.conv_v = (of_conv.rows(i) for i in range(3))
        # Transposed, and by even and odd channels of what goes in.
        self.w1, self.w2 = (
            nn.ParameterList(w.detach().mT.unsqueeze(0)[..., i::2].contiguous() for i in (0, 1))
            for w in (attn.w1, attn.w2)
        )
        self.w3 = nn.Parameter(attn.w3.detach().flatten(1).clone())
        columns = linear(attn.proj).weight[:, :, 0, 0]
        self.proj = pointwise(columns[:, :dim], attn.proj.bias)
        self.conv_proj = pointwise(columns[:, dim:], None)

    def forward(self, x: Tensor, angles: Angles | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; x without what its norm multiplies and adds."""
        q, k = (parts_of(x, products, self.num_heads) for products in (self.q, self.k))
        v = heads_of(self.v(x), self.num_heads)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        f = self.gated_unit(q, k, v)
        g = self.convolution(self.conv_q(x), self.conv_k(x), self.conv_v(x))
        return self.proj(f.reshape(x.shape)) + self.conv_proj(g)

    def gated_unit(self, q: Parts, k: Parts, v: Tensor) -> Tensor:
        """f of heads in parts, [B, h, D/2, N] each -> [B, h, D, N]."""
        first = (tuple(self.w1), tuple(self.w2))
        a, b = (_read(weights, k) for weights in first)
        sigma = b.sigmoid()
        values = (v * (b * sigma), v * a * (sigma * (1 + b * (1 - sigma))))
        share = 1.0 / v.shape[3]
        a, b = (
            _read(_stepped(weights, tuple((target @ x.mT) * share for x in k)), q)
            for weights, target in zip(first, values, strict=True)
        )
        return a * silu(b)

    def convolution(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """g, [B, D, H, W] each -> [B, D, H, W]."""
        taps = torch.cat([(x * v).sum((2, 3), keepdim=True) for x in neighbours(k)], 2)
        state = taps.flatten(2) * (1.0 / (q.shape[2] * q.shape[3]))
        (kernels,) = _stepped((self.w3,), (state,))
        return conv_per_sample(q, kernels, self.batch)
