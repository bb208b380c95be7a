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
    """Apply the 2-D rotary encoding pair by pair, [B, N, h, D] -> [B, N, h, D]."""
    if rotary is None:
        return x
    rows, cols = rotary
    out = torch.empty_like(x)
    half, width = x.shape[-1] // 2, cols.shape[0]
    for n in range(x.shape[1]):
        for axis, table in ((0, rows[n // width]), (1, cols[n % width])):
            for t, (cos, sin) in enumerate(table):
                c = axis * half + 2 * t
                out[:, n, :, c] = x[:, n, :, c] * cos - x[:, n, :, c + 1] * sin
                out[:, n, :, c + 1] = x[:, n, :, c + 1] * cos + x[:, n, :, c] * sin
    return out


def linear_attention_weights(
    q: Tensor,
    k: Tensor,
    mechanism: str,
    rotary: RotaryTables | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """The matrix A of a linear attention, for which out = A v, as [B, h, N, N]."""
    row = get_mechanism(mechanism)
    phi = row.phi.function
    valid = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    if key_padding_mask is not None:
        valid = ~key_padding_mask
    count = valid.sum(1)[:, None, None]  # [B, 1, 1]
    keep = valid[:, None, :].to(q.dtype)  # [B, 1, N]

    if row.key_weights == "uniform":
        weight = keep.expand(-1, q.shape[2], -1)  # [B, h, N]
    else:
        scale = q.shape[-1] ** -0.5
        global_query = torch.einsum("bhn,bnhd->bhd", keep, phi(q)) / count
        logits = scale * torch.einsum("bhd,bnhd->bhn", global_query, phi(k))
        logits = logits.masked_fill(~valid[:, None, :], -torch.inf)
        weight = count * torch.softmax(logits, dim=-1)

    similarity = torch.einsum("bnhd,bmhd->bhnm", phi(q), phi(k)) * weight[:, :, None, :]
    normaliser = similarity.sum(-1, keepdim=True) / count[..., None]
    if rotary is not None:
        similarity = torch.einsum(
            "bnhd,bmhd->bhnm", rotate_tokens(phi(q), rotary), rotate_tokens(phi(k), rotary)
        )
        similarity = similarity * weight[:, :, None, :]
    weights = similarity / count[..., None] / (normaliser + row.eps)
    return weights * valid[:, None, :, None]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str,
    rotary: RotaryTables | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Linear attention by its definition; see `vitlinear.ops.linear_attention`."""
    weights = linear_attention_weights(q, k, mechanism, rotary, key_padding_mask)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


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
