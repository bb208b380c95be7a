"""The definitions, written to be read: quadratic cost, any dtype, the oracle of every test.

Every function builds the explicit N x N matrix of attention weights. Nothing here is meant to be
fast; `vitlinear.ops.eager` computes the same outputs at linear cost.

Shapes: B batch, N tokens, h heads, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mechanisms import get_mechanism
from .rotary import RotaryTables


def rotate_tokens(x: Tensor, rotary: RotaryTables | None) -> Tensor:
    """Apply the 2-D rotary encoding pair by pair, [B, N, h, D] -> [B, N, h, D].

    Tables of the full width, [H, h D / 4, 2], turn the heads of a token side by side.
    """
    if rotary is None:
        return x
    rows, cols = rotary
    if x.shape[2] > 1 and 4 * rows.shape[1] == x.shape[2] * x.shape[3]:
        side_by_side = x.reshape(*x.shape[:2], 1, -1)
        return rotate_tokens(side_by_side, rotary).reshape(x.shape)
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    for axis, table in enumerate(_tables_of_tokens(rows, cols)):
        for t in range(table.shape[1]):
            c = axis * half + 2 * t
            cos, sin = table[:, t, 0, None], table[:, t, 1, None]  # [N, 1]
            out[..., c] = x[..., c] * cos - x[..., c + 1] * sin
            out[..., c + 1] = x[..., c + 1] * cos + x[..., c] * sin
    return out


def cosine_tokens(x: Tensor, tables: RotaryTables | None) -> Tensor:
    """Apply the cosine encoding channel by channel, [B, N, h, D] -> [B, N, h, 2 D]."""
    if tables is None:
        return x
    rows, cols = tables
    half = x.shape[-1] // 2
    cosines, sines = torch.empty_like(x), torch.empty_like(x)
    for axis, table in enumerate(_tables_of_tokens(rows, cols)):
        for t in range(table.shape[1]):
            c = axis * half + t
            cosines[..., c] = x[..., c] * table[:, t, 0, None]
            sines[..., c] = x[..., c] * table[:, t, 1, None]
    return torch.cat((cosines, sines), dim=-1)


def _tables_of_tokens(rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """The entry of each token n of a grid, row n // W and column n % W: [N, T, 2], twice."""
    tokens = torch.arange(rows.shape[0] * cols.shape[0], device=rows.device)
    return rows[tokens // cols.shape[0]], cols[tokens % cols.shape[0]]


def linear_attention_weights(
    q: Tensor,
    k: Tensor,
    mechanism: str,
    rotary: RotaryTables | None = None,
    key_padding_mask: Tensor | None = None,
    head_scale: Tensor | None = None,
    powers: Tensor | None = None,
    key_weights: Tensor | None = None,
) -> Tensor:
    """The matrix A of a linear attention, for which out = A v, as [B, h, N, N].

    Of a mechanism with two reads it is that of the first, which the first half of v takes.
    """
    row = get_mechanism(mechanism)
    scale = q.shape[-1] ** -0.5
    q_features, k_features = row.phi_q(q, powers), row.phi_k(k, powers)
    valid = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    if key_padding_mask is not None:
        valid = ~key_padding_mask
    count = valid.sum(1)[:, None, None, None]  # [B, 1, 1, 1]
    keep = valid[:, :, None, None].to(q.dtype)  # [B, N, 1, 1]

    if row.key_weights == "uniform":
        k_features = k_features * keep
    elif row.takes_key_weights:
        assert key_weights is not None
        k_features = k_features * keep * key_weights
    elif row.key_weights == "global_query":
        global_query = (q_features * keep).sum(1, keepdim=True) / count
        logits = scale * (global_query * k_features).sum(-1, keepdim=True)
        logits = logits.masked_fill(~valid[:, :, None, None], -torch.inf)
        k_features = k_features * count * torch.softmax(logits, dim=1)
    else:
        logits = k_features.masked_fill(~valid[:, :, None, None], -torch.inf)
        k_features = count * torch.softmax(logits, dim=1)

    similarity = torch.einsum("bnhd,bmhd->bhnm", q_features, k_features)
    z = similarity.sum(-1, keepdim=True) / count

    def encode(features: Tensor) -> Tensor:
        if row.positions == "cosine":
            return cosine_tokens(features, rotary)
        parts = features.split(q.shape[-1], dim=-1)  # of a wide feature map, which turn alike
        return torch.cat([rotate_tokens(part, rotary) for part in parts], dim=-1)

    similarity = torch.einsum("bnhd,bmhd->bhnm", encode(q_features), encode(k_features))
    if head_scale is not None:
        similarity = similarity * head_scale[:, None, None]
    a, b = row.reads.factors(z, scale, count)
    weights = (a * similarity + b * valid[:, None, None, :]) / count
    return weights * valid[:, None, :, None]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str,
    rotary: RotaryTables | None = None,
    key_padding_mask: Tensor | None = None,
    head_scale: Tensor | None = None,
    lepe: Tensor | None = None,
    gate: Tensor | None = None,
    powers: Tensor | None = None,
    key_weights: Tensor | None = None,
) -> Tensor:
    """Linear attention by its definition; see `vitlinear.ops.linear_attention`."""
    reads = [(q, v)]
    if get_mechanism(mechanism).reads_opposite:
        first, second = v.chunk(2, dim=-1)
        reads = [(q, first), (-q, second)]
    outs = []
    for query, values in reads:
        weights = linear_attention_weights(
            query, k, mechanism, rotary, key_padding_mask, head_scale, powers, key_weights
        )
        outs.append(torch.einsum("bhnm,bmhd->bnhd", weights, values))
    out = torch.cat(outs, dim=-1)
    if lepe is not None:
        out = out + lepe
    if gate is not None:
        out = out * gate
    if key_padding_mask is not None:
        out = out.masked_fill(key_padding_mask[:, :, None, None], 0)
    return out


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: RotaryTables | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Softmax attention by its definition; see `vitlinear.ops.softmax_attention`."""
    q, k = rotate_tokens(q, rotary), rotate_tokens(k, rotary)
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    if key_padding_mask is not None:
        logits = logits.masked_fill(key_padding_mask[:, None, None, :], -torch.inf)
    out = torch.einsum("bhnm,bmhd->bnhd", torch.softmax(logits, dim=-1), v)
    if key_padding_mask is not None:
        out = out.masked_fill(key_padding_mask[:, :, None, None], 0)
    return out
