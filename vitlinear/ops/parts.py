"""Linear attention whose sums over tokens are taken in parts.

Parts of the tokens, wherever and whenever their sums were taken, merge into the sums over all::

    query = merge_queries(query_part(a, m), query_part(b, m))  # where one query weighs the keys
    part = merge_parts(part_of(a, m, query), part_of(b, m, query))
    out = read_part(tokens, m, part)

Heads stand before tokens, as in `vitlinear.ops.eager`, whose formulas these are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_state import LinearAttentionState
from .eager import Tokens, attention_state, mean_query, read
from .mechanisms import Mechanism

Total = Callable[..., tuple[Tensor, ...]]
Gather = Callable[[Tensor], Tensor]


class QueryPart(NamedTuple):
    """The mean query of a part of the tokens.

    Attributes:
        number: Of tokens, [B, 1, 1, 1].
        query: Their mean feature, [B, h, 1, F].
    """

    number: Tensor
    query: Tensor

    def summed(self, total: Total, gather: Gather) -> QueryPart:
        """That of the parts of several processes, each of which calls this with its own."""
        number, query = total(self.number, self.number * self.query)
        return QueryPart(number, query / number.clamp(min=1))


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

    def summed(self, total: Total, gather: Gather) -> Part:
        """That of the parts of several processes, each of which calls this with its own.

        Args:
            total: Sums of tensors over the processes.
            gather: Those of all processes along a new first axis.
        """
        weight = rows = self.number
        logsumexp = self.logsumexp
        if logsumexp.numel():
            logsumexp = gather(logsumexp).logsumexp(0)
            weight, rows = _softmax_weights(self, logsumexp)
        sums = [self.state * rows, self.norm, self.mean_v]
        if self.norm.numel():
            sums[1] = self.norm * weight
        if self.mean_v.numel():
            sums[2] = self.mean_v * self.number
        number, state, norm, mean_v = total(self.number, *sums)
        least = number.clamp(min=1)
        if not logsumexp.numel():
            state, norm = state / least, norm / least if norm.numel() else norm
        mean_v = mean_v / least if mean_v.numel() else mean_v
        return Part(number, state, norm, mean_v, self.query, logsumexp)


def _softmax_weights(part: Part, logsumexp: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of the norm of a part, and of the rows of its state, in a softmax over more.

    Args:
        part: With a softmax.
        logsumexp: Over all tokens.
    """
    bound = logsumexp.clamp(min=torch.finfo(logsumexp.dtype).min)  # -inf less itself is NaN
    weight = (part.logsumexp - bound).exp()
    rows = weight.transpose(-1, -2)
    # One weight for each row of the state. Of a softmax for each channel, the cosine encoding puts
    # the two rows of a channel side by side.
    if rows.shape[2] > 1:
        rows = rows.repeat_interleave(part.state.shape[2] // rows.shape[2], 2)
    return weight, rows


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
        weight_a, rows_a = _softmax_weights(a, logsumexp)
        weight_b, rows_b = _softmax_weights(b, logsumexp)
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
