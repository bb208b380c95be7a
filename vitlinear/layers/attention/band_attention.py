"""Attention of the tokens of a band to all tokens of the map.

Linear attention merges what the bands bring to its state. Softmax attention gathers the keys and
values of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vitlinear.ops import (
    LinearAttentionState,
    Mechanism,
    RotaryTables,
    get_mechanism,
    linear_attention_state,
    read_linear_attention_state,
)
from vitlinear.ops.attention import (
    check_key_weights,
    check_terms,
    check_tokens,
    is_training,
    mask_of_lengths,
)
from vitlinear.ops.eager import (
    Tokens,
    accumulation_dtype,
    epilogue,
    prepare,
    saturate,
    table_of_heads,
    without_autocast,
)
from vitlinear.ops.parts import (
    Part,
    QueryPart,
    merge_parts,
    merge_queries,
    part_of,
    query_part,
    read_part,
)
from vitlinear.ops.rotary import rotate
from vitlinear.ops.states import runs_on
from vitlinear.ops.terms import Terms
from vitlinear.ops.tracing import keeps_nothing

from ..band import Band

# A tensor, or what makes it where it is needed.
Made = Tensor | Callable[[], Tensor]


def made(x: Made | None) -> Tensor | None:
    """The tensor."""
    return x if x is None or isinstance(x, Tensor) else x()


def band_attention(
    band: Band,
    q: Made,
    k: Made,
    v: Made,
    attn_type: str,
    rotary: RotaryTables | None = None,
    key_padding_mask: Tensor | None = None,
    head_scale: Tensor | None = None,
    lepe: Made | None = None,
    gate: Made | None = None,
    powers: Tensor | None = None,
    key_weights: Made | None = None,
    backend: str = "auto",
) -> Tensor:
    """(Attention(q, k, v) + lepe) * gate of a band; arguments as `scriptable_attention`.

    Args:
        band: Which the tokens, and the rows of the position tables, are of.
        q: Queries, [B, n, h, D].
        k: Keys.
        v: Values.
        attn_type: Mechanism, or ``'softmax'``.
        rotary: Position tables of the rows of the band.
        key_padding_mask: [B, n] bool.
        head_scale: [h].
        lepe: Like q.
        gate: Like q.
        powers: [h, D].
        key_weights: [B, n, h, 1 or F].
        backend: One of `vitlinear.ops.BACKENDS`, for linear attention.

    Returns:
        [B, n, h, D].
    """
    if attn_type == "softmax":
        out = _softmax(band, q, k, v, rotary, key_padding_mask)
        return epilogue(out, made(lepe), made(gate))
    mechanism = get_mechanism(attn_type)
    passes = band.repeats or key_padding_mask is not None
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor) and not passes:
        all_of_it = Terms(
            rotary, None, head_scale, made(lepe), made(gate), powers, made(key_weights)
        )
        check_tokens(q, k, v)
        check_key_weights(k, mechanism, all_of_it.key_weights)
        check_terms(q, all_of_it, mechanism.positions)
        chosen = runs_on(
            backend, q, attn_type, all_of_it, v.shape[-1], is_training(all_of_it, q, k, v)
        )
        if chosen != "eager":
            return _by_states(band, q, k, v, mechanism, all_of_it, chosen)

    terms = Terms(rotary, head_scale=head_scale, powers=powers)

    def tokens(
        q: Made | None, k: Made | None, v: Made | None, ends: bool = False
    ) -> tuple[Tokens, Tensor]:
        """These of the band, with the terms of the epilogue if it ends; and one as it was given."""
        q, k, v = made(q), made(k), made(v)
        given = k if q is None else q
        assert given is not None
        all_terms = terms._replace(key_padding_mask=mask_of_lengths(key_padding_mask, given))
        if ends:
            all_terms = all_terms._replace(lepe=made(lepe), gate=made(gate))
        if k is not None:
            all_terms = all_terms._replace(key_weights=made(key_weights))
            check_key_weights(k, mechanism, all_terms.key_weights)
        check_terms(given, all_terms, mechanism.positions)
        with without_autocast(given):
            return prepare(q, k, v, mechanism, all_terms, own=keeps_nothing()), given

    # In one pass everything is made once. In several, each thing is made where it is used.
    whole = None if band.repeats else tokens(q, k, v, ends=True)

    def query_of_band() -> QueryPart:
        given, example = whole or tokens(q, None, None)
        with without_autocast(example):
            return query_part(own_part(band, given), mechanism)

    def part_of_band() -> Part:
        given, example = whole or tokens(None, k, v)
        with without_autocast(example):
            return part_of(own_part(band, given), mechanism, query)

    query = None
    if mechanism.has_global_query:
        query = QueryPart(*band.merge_made(query_of_band, merge_queries))
    part = Part(*band.merge_made(part_of_band, merge_parts))
    given, example = whole or tokens(q, None, None, ends=True)
    with without_autocast(example):
        out = read_part(given, mechanism, part)
        return saturate(out.transpose(1, 2), example.dtype).to(example.dtype)


def _by_states(
    band: Band, q: Tensor, k: Tensor, v: Tensor, mechanism: Mechanism, terms: Terms, backend: str
) -> Tensor:
    """`band_attention` by operators that keep their inputs alone, kernels among them."""
    keys, values = band.own_tokens(k), band.own_tokens(v)
    rotary = terms.rotary
    if rotary is not None:
        first, last = (row - band.start for row in band.own)
        rotary = RotaryTables(rotary.rows[first:last], rotary.cols)
    weights = terms.key_weights
    weights = None if weights is None else band.own_tokens(weights)
    own = Terms(rotary, powers=terms.powers)
    if mechanism.has_global_query:
        part = _weighted_part(band, band.own_tokens(q), keys, values, mechanism, own)
    else:
        state = linear_attention_state(
            keys, values,
            mechanism=mechanism.name, rotary=rotary, powers=terms.powers, key_weights=weights,
            backend=backend,
        )  # fmt: skip
        number = state.state.new_full((q.shape[0], 1, 1, 1), keys.shape[1])
        part = Part(number, *state.flatten())
    number, *merged = band.merge(part, merge_parts)
    state = LinearAttentionState.unflatten(*merged)
    if mechanism.read_out == "clamped":  # by the number of tokens: here all, there the queries
        share = number / q.shape[1]
        norm = None if state.norm is None else state.norm * share
        state = state._replace(state=state.state * share, norm=norm)
    return read_linear_attention_state(
        q, state,
        mechanism=mechanism.name, rotary=terms.rotary, head_scale=terms.head_scale,
        lepe=terms.lepe, gate=terms.gate, powers=terms.powers, backend=backend,
    )  # fmt: skip


def _weighted_part(
    band: Band, q: Tensor, k: Tensor, v: Tensor, mechanism: Mechanism, terms: Terms
) -> Part:
    """The state of own tokens whose keys the mean query of all weighs.

    No operator is given a query. So these are the formulas, which backward runs again.
    """
    fresh = not torch.is_grad_enabled()

    def query_of(q: Tensor) -> QueryPart:
        with without_autocast(q):
            return query_part(prepare(q, None, None, mechanism, terms, own=fresh), mechanism)

    def part_with(k: Tensor, v: Tensor, query: QueryPart) -> Part:
        with without_autocast(k):
            return part_of(prepare(None, k, v, mechanism, terms, own=fresh), mechanism, query)

    query = band.merge(_again(query_of, q), merge_queries)
    return _again(part_with, k, v, query)


def _again(function: Callable[..., Any], *inputs: Any) -> Any:
    """Run the function; backward keeps its inputs and runs it again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def own_part(band: Band, tokens: Tokens) -> Tokens:
    """Of the tokens of a band, those of its own rows."""

    def own(x: Tensor | None, axis: int) -> Tensor | None:
        return None if x is None else band.own_tokens(x, axis)

    part = tokens._replace(
        q=own(tokens.q, 2),
        k=own(tokens.k, 2),
        v=own(tokens.v, 2),
        table=own(tokens.table, -3),
        valid=own(tokens.valid, 2),
        key_weights=own(tokens.key_weights, 2),
    )
    given = part.k if part.q is None else part.q
    assert given is not None
    if part.valid is None:
        return part._replace(num_valid=given.shape[2])
    number = part.valid.sum(2, keepdim=True).clamp(min=1)
    return part._replace(num_valid=number.to(given.dtype))


def _softmax(
    band: Band,
    q: Made,
    k: Made,
    v: Made,
    rotary: RotaryTables | None,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """softmax(R(q) R(k)^T / sqrt(D)) v, [B, n, h, D] -> [B, n, h, D]."""
    q, k, v = (x if isinstance(x, Tensor) else x() for x in (q, k, v))
    if rotary is not None:
        with without_autocast(q):
            table = table_of_heads(rotary, "rotary", *q.shape[2:]).to(accumulation_dtype(q.dtype))
            q, k = (
                rotate(x.transpose(1, 2).to(table.dtype), table).to(x.dtype).transpose(1, 2)
                for x in (q, k)
            )
    k, v, mask = gather_keys(band, k, v, key_padding_mask)
    if mask is not None:
        mask = ~mask[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def gather_keys(
    band: Band, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values [B, n, h, D] and a mask [B, n] of a band -> those of all bands."""
    parts = (k, v) if mask is None else (k, v, mask)
    width = (k.shape[1] - band.prefix) // (band.stop - band.start)
    lengths = [band.own_lengths(width)] * len(parts)
    k, v, *masks = band.gather(1, *(band.own_tokens(x) for x in parts), lengths=lengths)
    return k, v, masks[0] if masks else None


def merge_sums(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A sum and the number of its terms, of two parts."""
    return a[0] + b[0], a[1] + b[1]


def band_state(
    band: Band,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    later: bool = True,
    key_weights: Tensor | None = None,
) -> Tensor:
    """Mean of k v^T over the tokens of all bands; see `scriptable_state`.

    Args:
        band: Which the tokens are of.
        k: Keys, [B, n, h, D].
        v: Values, [B, n, h, Dv].
        key_padding_mask: [B, n] bool.
        later: As `Band.merge`: the result may be NaN, and no other sum of the layer depends on it.
        key_weights: [B, n, h, 1 or D].
    """
    dtype = accumulation_dtype(k.dtype)
    with without_autocast(k):
        k, v = (band.own_tokens(x).transpose(1, 2).to(dtype) for x in (k, v))
        weights = None
        if key_weights is not None:
            weights = band.own_tokens(key_weights).transpose(1, 2).to(dtype)
        number = k.new_full((k.shape[0], 1, 1, 1), k.shape[2])
        if key_padding_mask is not None:
            valid = ~band.own_tokens(key_padding_mask)
            padding = ~valid[:, None, :, None]
            k = k.masked_fill(padding, 0)
            weights = None if weights is None else weights.masked_fill(padding, 0)
            number = valid.sum(1).to(dtype).reshape(number.shape)
        k = k if weights is None else k * weights
        total, number = band.merge((k.transpose(-1, -2) @ v, number), merge_sums, later)
    return total / number.clamp(min=1)
