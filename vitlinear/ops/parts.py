"""Linear attention whose sums over tokens are taken in parts.

The sums of parts of the tokens, wherever and whenever they were taken, merge into those of all::

    query = merge_queries(...)                     # only where one query weighs the keys
    part = merge_parts(part_of(...), part_of(...))  # or merge_softmax_parts
    out = read(tokens, mechanism, part)

Shapes and names as in `vitlinear.ops.eager`: heads stand before tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .eager import Tokens, epilogue, global_query_logits
from .mechanisms import Mechanism
from .rotary import encode


class QueryPart(NamedTuple):
    """Sum of the features of queries, [B, h, 1, F], and number of tokens, [B, 1, 1, 1]."""

    total: Tensor
    count: Tensor


class Part(NamedTuple):
    """What a part of the tokens brings to the state.

    Attributes:
        count: Number of tokens, [B, 1, 1, 1].
        state: Sum of encoded keys times values, [B, h, F', D]; with a softmax over keys its
            weights are those of the softmax over this part.
        norm: Sum of the features of keys, weighted alike, [B, h, 1, F].
        values: Sum of the values, [B, h, 1, D].
        logsumexp: Of the softmax over this part, [B, h, 1, 1 or F]; zeros without a softmax.
    """

    count: Tensor
    state: Tensor
    norm: Tensor
    values: Tensor
    logsumexp: Tensor


def count_tokens(tokens: Tokens) -> Tensor:
    """Number of the tokens that exist, [B, 1, 1, 1]."""
    if tokens.valid is None:
        return tokens.q.new_full((tokens.q.shape[0], 1, 1, 1), tokens.q.shape[2])
    return tokens.valid.sum(2, keepdim=True).to(tokens.q.dtype)


def query_part(tokens: Tokens, mechanism: Mechanism) -> QueryPart:
    """What a part of the tokens brings to the mean query."""
    features = mechanism.phi_q.function(tokens.q)
    if tokens.valid is not None:
        features = features * tokens.valid
    return QueryPart(features.sum(2, keepdim=True), count_tokens(tokens))


def merge_queries(a: QueryPart, b: QueryPart) -> QueryPart:
    """The two together."""
    return QueryPart(a.total + b.total, a.count + b.count)


def part_of(tokens: Tokens, mechanism: Mechanism, query: QueryPart | None) -> Part:
    """What a part of the tokens brings to the state.

    Args:
        tokens: The part, from `prepare`.
        mechanism: The row of the table.
        query: Of all tokens; None unless one query weighs the keys.
    """
    k_features = mechanism.phi_k.function(tokens.k)
    weighted = k_features if tokens.valid is None else k_features * tokens.valid
    logsumexp = k_features.new_zeros(*k_features.shape[:2], 1, 1)
    if mechanism.has_key_softmax:
        logits = k_features
        if query is not None:
            scale = tokens.q.shape[-1] ** -0.5
            logits = global_query_logits(query.total / query.count, k_features, scale)
        if tokens.valid is not None:
            logits = logits.masked_fill(~tokens.valid, -torch.inf)
        logsumexp = logits.logsumexp(dim=2, keepdim=True)
        # Of a part of padding alone it is -inf, and the difference of two of these is NaN.
        weights = (logits - logsumexp.clamp(min=torch.finfo(logits.dtype).min)).exp()
        weighted = k_features * weights if mechanism.has_global_query else weights
    encoded = encode(weighted, tokens.table, mechanism.positions)
    return Part(
        count_tokens(tokens),
        encoded.transpose(-1, -2) @ tokens.v,
        weighted.sum(2, keepdim=True),
        tokens.v.sum(2, keepdim=True),
        logsumexp,
    )


def merge_parts(a: Part, b: Part) -> Part:
    """The two together, of sums alone."""
    return Part(*(x + y for x, y in zip(a, b, strict=True)))


def merge_softmax_parts(a: Part, b: Part) -> Part:
    """The two together; the weights of the softmax become those over both."""
    logsumexp = torch.logaddexp(a.logsumexp, b.logsumexp)
    share_a, share_b = (
        (x.logsumexp - logsumexp.clamp(min=torch.finfo(logsumexp.dtype).min)).exp() for x in (a, b)
    )
    # One share for each row of the state: a rotation mixes neighbouring features of a head that
    # share one weight, and the cosine encoding puts the two rows of a feature side by side.
    repeats = a.state.shape[2] // share_a.shape[3] if share_a.shape[3] > 1 else 1
    rows_a, rows_b = (x.transpose(-1, -2).repeat_interleave(repeats, 2) for x in (share_a, share_b))
    return Part(
        a.count + b.count,
        a.state * rows_a + b.state * rows_b,
        a.norm * share_a + b.norm * share_b,
        a.values + b.values,
        logsumexp,
    )


def read(tokens: Tokens, mechanism: Mechanism, part: Part) -> Tensor:
    """The output for some queries, [B, h, n, D], epilogue and all.

    Args:
        tokens: Whose queries read; keys and values are not looked at.
        mechanism: The row of the table.
        part: Of all tokens.
    """
    q, _, _, table, valid, _, head_scale, lepe, gate = tokens
    count = part.count.clamp(min=1)
    per_token = torch.ones_like(count) if mechanism.has_key_softmax else 1 / count
    features = mechanism.phi_q.function(q)
    state = part.state * per_token
    if head_scale is not None:
        state = state * head_scale
    a: Tensor | float = 1.0
    b: Tensor | float = 0.0
    scale = q.shape[-1] ** -0.5
    if mechanism.reads.uses_norm:
        z = features @ (part.norm * per_token).transpose(-1, -2)
        a, b = mechanism.reads.factors(z, scale, count)
    out = encode(features * a, table, mechanism.positions) @ state
    if mechanism.reads.uses_mean:
        out = out + b * (part.values / count)
    out = epilogue(out, lepe, gate)
    return out if valid is None else out.masked_fill(~valid, 0)
