"""Linear attention whose sums over tokens are taken in parts.

Parts of the tokens, wherever and whenever their sums were taken, merge into the sums over all::

    query = merge_queries(query_part(a, m), query_part(b, m))  # where one query weighs the keys
    part = merge_parts(part_of(a, m, query), part_of(b, m, query))
    out = read_part(tokens, m, part)

Heads stand before tokens, as in `vitlinear.ops.eager`, whose formulas these are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .attention_state import LinearAttentionState
from .eager import Tokens, attention_state, mean_query, read
from .mechanisms import Mechanism


class QueryPart(NamedTuple):
    """The mean query of a part of the tokens.

    Attributes:
        number: Of tokens, [B, 1, 1, 1].
        query: Their mean feature, [B, h, 1, F].
    """

    number: Tensor
    query: Tensor


class Part(NamedTuple):
    """The state of a part of the tokens; [0] for what the mechanism has not.

    Attributes:
        number: Of tokens, [B, 1, 1, 1].
        state: As in `LinearAttentionState`, like the rest.
        norm: [B, h, 1, F].
        mean_v: [B, h, 1, Dv].
        query: [B, h, 1, F].
        logsumexp: [B, h, 1, 1 or F].
    """

    number: Tensor
    state: Tensor
    norm: Tensor
    mean_v: Tensor
    query: Tensor
    logsumexp: Tensor


def _number_of(tokens: Tokens) -> Tensor:
    """Number of the tokens that exist, [B, 1, 1, 1]."""
    given = tokens.k if tokens.q is None else tokens.q
    assert given is not None
    if tokens.valid is None:
        return given.new_full((given.shape[0], 1, 1, 1), given.shape[2])
    return tokens.valid.sum(2, keepdim=True).to(given.dtype)


def query_part(tokens: Tokens, mechanism: Mechanism) -> QueryPart:
    """The mean query of some tokens, from `prepare`."""
    assert tokens.q is not None
    features = mechanism.phi_q(tokens.q, tokens.powers)
    return QueryPart(_number_of(tokens), mean_query(features, tokens))


def merge_queries(a: QueryPart, b: QueryPart) -> QueryPart:
    """The mean query of both."""
    number = a.number + b.number
    total = a.number * a.query + b.number * b.query
    return QueryPart(number, total / number.clamp(min=1))


def part_of(tokens: Tokens, mechanism: Mechanism, query: QueryPart | None) -> Part:
    """The state of some tokens.

    Args:
        tokens: From `prepare`.
        mechanism: The row of the table.
        query: Of all tokens; None unless one query weighs the keys.
    """
    number = _number_of(tokens)
    state = attention_state(tokens, mechanism, None if query is None else query.query)
    part = Part(number, *state.flatten())
    if mechanism.has_key_softmax:  # padding alone brings nothing
        part = part._replace(logsumexp=part.logsumexp.masked_fill(number == 0, -torch.inf))
    return part


def merge_parts(a: Part, b: Part) -> Part:
    """The state of both: means by their numbers of tokens, softmaxes by their sums."""
    number = a.number + b.number
    share_a, share_b = (x.number / number.clamp(min=1) for x in (a, b))
    weight_a, weight_b = rows_a, rows_b = share_a, share_b
    logsumexp = a.logsumexp
    if logsumexp.numel():
        logsumexp = torch.logaddexp(a.logsumexp, b.logsumexp)
        bound = logsumexp.clamp(min=torch.finfo(logsumexp.dtype).min)  # -inf less itself is NaN
        weight_a, weight_b = ((x.logsumexp - bound).exp() for x in (a, b))
        # One weight for each row of the state. Of a softmax for each channel, the cosine encoding
        # puts the two rows of a channel side by side.
        rows_a, rows_b = (x.transpose(-1, -2) for x in (weight_a, weight_b))
        if rows_a.shape[2] > 1:
            repeats = a.state.shape[2] // rows_a.shape[2]
            rows_a, rows_b = (x.repeat_interleave(repeats, 2) for x in (rows_a, rows_b))
    return Part(
        number,
        a.state * rows_a + b.state * rows_b,
        a.norm * weight_a + b.norm * weight_b if a.norm.numel() else a.norm,
        a.mean_v * share_a + b.mean_v * share_b if a.mean_v.numel() else a.mean_v,
        a.query,
        logsumexp,
    )


def read_part(tokens: Tokens, mechanism: Mechanism, part: Part) -> Tensor:
    """The output for some queries, [B, h, n, Dv], epilogue and all.

    Args:
        tokens: Whose queries read; keys and values are not looked at.
        mechanism: The row of the table.
        part: Of all tokens.
    """
    number, *state = part
    tokens = tokens._replace(num_valid=number.clamp(min=1))
    return read(tokens, LinearAttentionState.unflatten(*state), mechanism)
