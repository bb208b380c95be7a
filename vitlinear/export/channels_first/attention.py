"""Attention on maps [B, C, H, W]: heads are [B, h, D, N], and nothing moves in memory.

Queries and keys come in parts, each from a product of its own: even and odd channels where
positions turn neighbouring pairs. Rotation then takes two parts to two parts, without a slice or a
concatenation, and a product over all channels is the sum of those over the parts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlinear.layers import GatedAttention
from vitlinear.layers.attention.gated_attention import NormGatedAttention
from vitlinear.ops import RotaryTables, get_mechanism
from vitlinear.ops.mechanisms import Mechanism

from .layers import ChannelNorm, convolution, pointwise

Parts = tuple[Tensor, ...]


def rotate(parts: Parts, tables: RotaryTables) -> Parts:
    """Turn even and odd channels, [B, h, D/2, N] each, by the positions of the map."""
    even, odd = parts
    height, width = len(tables.rows), len(tables.cols)
    rows = tables.rows.permute(2, 1, 0)[..., None].expand(-1, -1, -1, width)
    cols = tables.cols.permute(2, 1, 0)[:, :, None].expand(-1, -1, height, -1)
    cos, sin = torch.cat((rows, cols), dim=1).flatten(2)
    return even * cos - odd * sin, odd * cos + even * sin


def product(a: Parts, b: Parts) -> Tensor:
    """Sum over the parts of a^T b, [B, h, D, N] and [B, h, D, M] -> [B, h, N, M]."""
    out = a[0].mT @ b[0]
    for x, y in zip(a[1:], b[1:], strict=True):
        out = out + x.mT @ y
    return out


def elu_plus_one(x: Tensor) -> Tensor:
    """``elu(x) + 1`` of steps that runtimes fuse."""
    return x.clamp(min=0) + x.clamp(max=0).exp()


def norm_aware(parts: Parts) -> Parts:
    """`vitlinear.ops.features.norm_aware_query` of channels in parts."""
    square = sum((x * x).sum(2, keepdim=True) for x in parts)
    assert isinstance(square, Tensor)
    norm = square.sqrt()
    inverse = norm.clamp(min=1e-19).reciprocal()
    power = 1.5 + 3 * norm.tanh()
    return tuple(
        torch.cat(((x * inverse).clamp(min=0), (-x * inverse).clamp(min=0)), dim=2) ** power
        for x in parts
    )


def cubed(parts: Parts) -> Parts:
    """`vitlinear.ops.features.cubed_key` of channels in parts."""
    both = (torch.cat((x.clamp(min=0), (-x).clamp(min=0)), dim=2) for x in parts)
    return tuple(x * x * x for x in both)


FEATURES = {
    "elu+1": lambda parts: tuple(map(elu_plus_one, parts)),
    "relu": lambda parts: tuple(x.clamp(min=0) for x in parts),
    "identity": lambda parts: parts,
    "norm-aware": norm_aware,
    "cubed": cubed,
}


def rotate_features(parts: Parts, tables: RotaryTables, halves: int) -> Parts:
    """As `rotate`, of features that are as many times as wide: each half turns by itself."""
    if halves == 1:
        return rotate(parts, tables)
    doubled = RotaryTables(*(tables))
    even, odd = parts
    height, width = len(doubled.rows), len(doubled.cols)
    rows = doubled.rows.permute(2, 1, 0)[..., None].expand(-1, -1, -1, width)
    cols = doubled.cols.permute(2, 1, 0)[:, :, None].expand(-1, -1, height, -1)
    cos, sin = torch.cat((rows, cols, rows, cols), dim=1).flatten(2)
    return even * cos - odd * sin, odd * cos + even * sin


def linear_attention(
    q: Parts, k: Parts, v: Tensor, mechanism: Mechanism, tables: RotaryTables | None,
    head_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`vitlinear.ops.linear_attention` on heads [B, h, D, N]; see `vitlinear.ops.mechanisms`.

    Args:
        q: Queries in parts.
        k: Keys in parts.
        v: Values, [B, h, Dv, N].
        mechanism: Row of the table.
        tables: Positions of the map.
        head_scale: tau, [h].

    Returns:
        [B, h, Dv, N].
    """
    length = v.shape[-1]
    s = float(sum(x.shape[2] for x in q)) ** -0.5
    q, k = FEATURES[mechanism.query_map](q), FEATURES[mechanism.key_map](k)
    if mechanism.has_global_query:
        logits = product(tuple(s * x.mean(-1, keepdim=True) for x in q), k)
        weights = logits.softmax(-1)  # the mean over tokens, not the sum: N is in it
        norm = tuple(x @ weights.mT for x in k)
        values = v * weights
    else:
        norm = tuple(x.mean(-1, keepdim=True) for x in k)
        values = v * (1.0 / length)
    reads = mechanism.reads
    z = product(norm, q)
    a, b = reads.factors(z, s, length)
    if tables is not None:
        expansion = mechanism.phi_q.expansion
        q, k = rotate_features(q, tables, expansion), rotate_features(k, tables, expansion)
    out: Tensor | None = None
    for x, y in zip(q, k, strict=True):
        state = values @ y.mT
        if head_scale is not None:
            state = state * head_scale[:, None, None]
        read = state @ x
        out = read if out is None else out + read
    assert out is not None
    out = out * a
    return out + b * v.mean(-1, keepdim=True) if reads.uses_mean else out


def softmax_attention(q: Parts, k: Parts, v: Tensor, tables: RotaryTables | None) -> Tensor:
    """softmax(s q^T k) over the keys on heads [B, h, D, N], as `linear_attention`."""
    s = float(sum(x.shape[2] for x in q)) ** -0.5
    q = tuple(x * s for x in q)
    if tables is not None:
        q, k = rotate(q, tables), rotate(k, tables)
    whole_q, whole_k = torch.cat(q, dim=2), torch.cat(k, dim=2)
    weights = (whole_q.mT @ whole_k).softmax(-1)
    return v @ weights.mT


class ChannelsFirstGatedAttention(nn.Module):
    """`GatedAttention` or `NormGatedAttention` on a map [B, C, H, W]."""

    def __init__(self, attn: GatedAttention, norm: nn.LayerNorm) -> None:
        """Take the parameters over.

        Args:
            attn: The layer.
            norm: The norm before it, whose weight and bias become part of the products.
        """
        super().__init__()
        heads, width = attn.num_heads, attn.head_dim
        self.num_heads = heads
        self.attn_type = attn.attn_type
        weight = attn.qkvo.weight.unflatten(0, (4, heads, width))
        bias = attn.qkvo.bias.unflatten(0, (4, heads, width))

        def rows(i: int, step: slice = slice(None)) -> nn.Conv2d:
            return pointwise(weight[i, :, step].flatten(0, 1), bias[i, :, step].flatten(), norm)

        even, odd = slice(0, None, 2), slice(1, None, 2)
        self.q = nn.ModuleList((rows(0, even), rows(0, odd)))
        self.k = nn.ModuleList((rows(1, even), rows(1, odd)))
        self.v = rows(2)
        self.o = rows(3)
        self.lepe = convolution(attn.lepe)
        self.temperature = attn.temperature
        self.norm: nn.Module | None = None
        of_norm = None
        if isinstance(attn, NormGatedAttention):
            self.norm = ChannelNorm(attn.norm.eps)
            self.norm_weight = nn.Parameter(attn.norm.weight.detach()[:, None, None].clone())
            self.norm_bias = nn.Parameter(attn.norm.bias.detach()[:, None, None].clone())
        self.proj = pointwise(attn.proj.weight, attn.proj.bias, of_norm)

    def forward(self, x: Tensor, tables: RotaryTables) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; x without what its norm multiplies and adds."""

        def heads(x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], self.num_heads, -1, x.shape[2] * x.shape[3])

        q, k = (tuple(heads(conv(x)) for conv in convs) for convs in (self.q, self.k))
        values = self.v(x)
        if self.attn_type == "softmax":
            out = softmax_attention(q, k, heads(values), tables)
        else:
            out = linear_attention(
                q, k, heads(values), get_mechanism(self.attn_type), tables, self.temperature
            )
        out = out.reshape(values.shape) + self.lepe(values)
        gate = self.o(x)
        if self.norm is not None:
            out, gate = self.norm(out) * self.norm_weight + self.norm_bias, nn.functional.silu(gate)
        return self.proj(out * gate)
