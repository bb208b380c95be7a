"""The linear-cost formulas in plain, differentiable PyTorch.

What layers run on CPUs, under `torch.compile`, in exported programs and wherever a second or a
forward-mode derivative is wanted. States, normalisers and softmax statistics are float32 (float64
for float64 inputs) whatever the type of the inputs, autocast or not.

Inside this folder heads stand before tokens: q, k, v, out are [B, h, N, D], views of the
[B, N, h, D] that callers hold. F is the width of the feature map, D or 2 D.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu
from .attention_state import LinearAttentionState
from .mechanisms import Factor, Mechanism
from .precision import accumulation_dtype
from .rotary import RotaryTables, encode, is_full_width, rotate, token_table
from .terms import Terms
from .tracing import keeps_nothing, takes_functions


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Keep autocast from rounding the states back to half precision.

    Nothing is entered when autocast is off: the context would otherwise appear as a sub-program
    in exported graphs, and on meta tensors it raises.
    """
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound a result that will be cast: float16 then holds its largest number, not infinity."""
    if dtype != torch.float16:
        return x
    return x.clamp(-65504.0, 65504.0)  # in numbers, for TorchScript


class _SaturatingGradient(torch.autograd.Function):
    """float16 -> float32 whose gradient, cast back, holds float16's largest number, not infinity.

    The registered operators saturate their gradients in the same way.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.float()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return saturate(grad, torch.float16).half()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return tangent.float()


def widen(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to the accumulation type."""
    if x.dtype == torch.float16 and x.requires_grad and takes_functions():
        return _SaturatingGradient.apply(x)
    return x.to(dtype)


class Tokens(NamedTuple):
    """Inputs brought into the form that the formulas work in; None for what is not there."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    table: Tensor | None  # of positions; [N, F/2, 2] or [h, N, F/2, 2], [N, F, 2] for cosine
    valid: Tensor | None  # [B, 1, N, 1], True for tokens that exist
    num_valid: Tensor | int  # number of those, in the accumulation type, [B, 1, 1, 1] or N
    head_scale: Tensor | None = None  # tau, [h, 1, 1]
    lepe: Tensor | None = None  # [B, h, N, D], any strides, any type
    gate: Tensor | None = None  # likewise
    powers: Tensor | None = None  # of feature maps, [h, 1, D]
    key_weights: Tensor | None = None  # that the caller gave, [B, h, N, 1 or F], 0 for padding


def prepare(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    mechanism: Mechanism | None,
    terms: Terms,
    *,
    own: bool,
) -> Tokens:
    """Heads before tokens, accumulation type, padded tokens zeroed.

    Terms of the epilogue stay as they are: what they meet is in the accumulation type already, and
    autograd would keep a copy. Only float16 is widened, for the sake of its gradient.

    Args:
        q: Queries, [B, N, h, D]; None for a state alone.
        k: Keys, likewise; None for a read alone.
        v: Values, [B, N, h, Dv]; None for a read alone.
        mechanism: Decides the width of the position table; None for softmax attention.
        terms: What was given besides.
        own: Give queries and keys contiguous memory of their own at once. Feature maps are two to
            three times faster on it, and `linear_attention_forward` may write to it; but autograd
            would keep the copies.
    """
    rotary, key_padding_mask, head_scale, lepe, gate, powers, key_weights = terms
    given = k if q is None else q
    assert given is not None
    length, heads, head_dim = given.shape[1:]
    dtype = accumulation_dtype(given.dtype)
    lepe, gate = (_epilogue_term(x, key_padding_mask) for x in (lepe, gate))
    if head_scale is not None:
        head_scale = widen(head_scale, dtype)[:, None, None]
    if powers is not None:
        powers = widen(powers, dtype)[:, None, :]
    if key_weights is not None:
        key_weights = widen(key_weights.transpose(1, 2), dtype)
    # A change of type makes a copy anyway: it might as well be contiguous.
    own = own or dtype != given.dtype
    q, k, v = (None if x is None else widen(x.transpose(1, 2), dtype) for x in (q, k, v))
    if own:
        q, k = (None if x is None else cpu.own(x) for x in (q, k))
    table = None
    if rotary is not None:
        positions = "rotary" if mechanism is None else mechanism.positions
        table = table_of_heads(rotary, positions, heads, head_dim).to(dtype)
    if table is not None and mechanism is not None and mechanism.phi_q.expansion > 1:
        table = torch.cat([table] * mechanism.phi_q.expansion, dim=-2)  # each D-wide part alike
    if key_padding_mask is None:
        return Tokens(q, k, v, table, None, length, head_scale, lepe, gate, powers, key_weights)
    valid = ~key_padding_mask[:, None, :, None]
    # Whatever stands in padding, NaN included, must not reach a sum as 0 * NaN.
    q, k, v, key_weights = (
        None if x is None else x.masked_fill(~valid, 0) for x in (q, k, v, key_weights)
    )
    num_valid = valid.sum(2, keepdim=True).clamp(min=1).to(dtype)
    return Tokens(q, k, v, table, valid, num_valid, head_scale, lepe, gate, powers, key_weights)


def table_of_heads(tables: RotaryTables, positions: str, heads: int, head_dim: int) -> Tensor:
    """The angles of each token, of each head where they differ from head to head."""
    differ = positions == "rotary" and is_full_width(tables, heads, head_dim)
    return token_table(tables, heads if differ else 1)


def _epilogue_term(x: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    """lepe or gate with heads before tokens, zeros for padding."""
    if x is None:
        return None
    x = x.transpose(1, 2)
    if x.dtype == torch.float16:
        x = widen(x, torch.float32)
    return x if key_padding_mask is None else x.masked_fill(key_padding_mask[:, None, :, None], 0)


def seen_keys(valid: Tensor) -> Tensor:
    """Keys that a softmax runs over, [B, 1, N, 1]: the valid ones.

    Of a sample of padding alone, all: its keys are zeros then, and over no keys softmax is NaN.
    """
    return valid | ~valid.any(dim=2, keepdim=True)


def global_query_logits(query: Tensor, k_features: Tensor, scale: float) -> Tensor:
    """Logits of the key weights, s qbar . phi(k_j), as [B, h, N, 1]."""
    return k_features @ (scale * query).transpose(-1, -2)


def hide_padding(logits: Tensor, valid: Tensor | None) -> Tensor:
    """Logits [B, h, N, 1 or F] of a softmax over keys, -inf for padding."""
    return logits if valid is None else logits.masked_fill(~seen_keys(valid), -torch.inf)


def epilogue(out: Tensor, lepe: Tensor | None, gate: Tensor | None) -> Tensor:
    """(out + lepe) * gate, of what is given, in the layout of lepe."""
    # These stand first because they decide the layout: [B, N, h, D], as the next layer wants it.
    if lepe is None:
        return out if gate is None else gate * out
    out = lepe + out
    return out if gate is None else cpu.times(out, gate)


def mean_query(q_features: Tensor, tokens: Tokens) -> Tensor:
    """The mean of phi(q) over the valid tokens, [B, h, 1, F]."""
    present = q_features if tokens.valid is None else q_features * tokens.valid
    return present.sum(dim=2, keepdim=True) / tokens.num_valid


def attention_state(
    tokens: Tokens, mechanism: Mechanism, query: Tensor | None = None
) -> LinearAttentionState:
    """The sums over keys and values.

    Args:
        tokens: From `prepare`, keys and values at least.
        mechanism: The row of the table.
        query: The mean query, where one weighs the keys.
    """
    k, v, valid, num_valid = tokens.k, tokens.v, tokens.valid, tokens.num_valid
    assert k is not None and v is not None
    reads = mechanism.reads
    # Contiguous after phi, not before: phi then keeps the view that it was given, and no matrix
    # product below makes, and keeps, a copy of its own.
    k_features = mechanism.phi_k(k, tokens.powers).contiguous()
    if not keeps_nothing():
        v = v.contiguous()

    logsumexp = norm = mean_v = None
    per_token: Tensor | float = 1.0 / num_valid
    if mechanism.has_key_softmax:
        logits = k_features
        if mechanism.has_global_query:
            assert query is not None
            logits = global_query_logits(query, k_features, k.shape[-1] ** -0.5)
        logits = hide_padding(logits, valid)
        logsumexp = logits.logsumexp(dim=2, keepdim=True)
        weights = cpu.exp(logits - logsumexp)  # w_j / N
        weighted = cpu.times(k_features, weights) if mechanism.has_global_query else weights
        per_token = 1.0
    elif mechanism.takes_key_weights:
        assert tokens.key_weights is not None
        weighted = cpu.times(k_features, tokens.key_weights)
    else:
        weighted = k_features if valid is None else cpu.times(k_features, valid)

    if reads.uses_norm:
        norm = weighted.sum(dim=2, keepdim=True) * per_token
    encoded = encode(weighted, tokens.table, mechanism.positions, own=True)
    state = (encoded.transpose(-1, -2) @ v) * per_token
    if reads.uses_mean:
        mean_v = v.sum(dim=2, keepdim=True) / num_valid
    return LinearAttentionState(state, norm, mean_v, query, logsumexp)


def opposite_state(state: Tensor) -> Tensor:
    """The state [..., F, Dv] that phi(q) reads where phi(-q) is to read the second half of values.

    Those columns have the halves of their rows exchanged. It is its own inverse and transpose.
    """
    first, second = state.chunk(2, dim=-1)
    return torch.cat((first, second.roll(state.shape[-2] // 2, dims=-2)), dim=-1)


def opposite_norm(norm: Tensor) -> Tensor:
    """m as phi(q) reads it for itself and for phi(-q), [..., 1, F] -> [..., 2, F]."""
    return torch.cat((norm, norm.roll(norm.shape[-1] // 2, dims=-1)), dim=-2)


def halves(x: Tensor) -> Tensor:
    """Channels of values by the read that they belong to, [..., Dv] -> [..., 2, Dv / 2]."""
    return x.unflatten(-1, (2, -1))


def read_state(
    q_features: Tensor, state: LinearAttentionState, tokens: Tokens, mechanism: Mechanism
) -> Tensor:
    """Outputs of queries that read a state, epilogue and all, [B, h, N, Dv].

    Args:
        q_features: phi(q), [B, h, N, F], contiguous; may be written to where nothing is kept.
        state: The sums over keys and values.
        tokens: From `prepare`, queries at least.
        mechanism: The row of the table.
    """
    q, valid = tokens.q, tokens.valid
    assert q is not None
    scaled = state.state if tokens.head_scale is None else state.state * tokens.head_scale
    after = None
    b: Factor = 0.0
    if mechanism.reads_opposite:
        scaled = opposite_state(scaled)
    if mechanism.reads.uses_norm:
        assert state.norm is not None
        norm = opposite_norm(state.norm) if mechanism.reads_opposite else state.norm
        z = q_features @ norm.transpose(-1, -2)
        a, b = mechanism.reads.factors(z, q.shape[-1] ** -0.5, tokens.num_valid)
        if not isinstance(a, Tensor):
            scaled = scaled * a
        elif mechanism.reads_opposite:
            after = a  # each half of the output has a factor of its own
        else:
            q_features = cpu.times(q_features, a)
    out = cpu.matmul(encode(q_features, tokens.table, mechanism.positions, own=True), scaled)
    if after is not None:
        out = cpu.times(halves(out), after.unsqueeze(-1)).flatten(-2)
    if mechanism.reads.uses_mean:
        assert isinstance(b, Tensor) and state.mean_v is not None
        out = cpu.add_product(out, b, state.mean_v)
    out = epilogue(out, tokens.lepe, tokens.gate)
    return out if valid is None else out.masked_fill(~valid, 0)


def read(tokens: Tokens, state: LinearAttentionState, mechanism: Mechanism) -> Tensor:
    """Outputs of queries that read a state, [B, h, N, Dv] in the accumulation type."""
    assert tokens.q is not None
    q_features = mechanism.phi_q(tokens.q, tokens.powers).contiguous()
    return read_state(q_features, state, tokens, mechanism)


def linear_attention_forward(
    tokens: Tokens, mechanism: Mechanism
) -> tuple[Tensor, LinearAttentionState]:
    """Output and state of a linear attention.

    The order of the steps is chosen for what autograd keeps: phi(q), phi(k), the encoded queries,
    the encoded keys and v, one contiguous tensor each, besides the views that it was given. Factors
    that depend on the token multiply features that are kept anyway, before the rotation, which
    keeps only its table. For half-precision inputs all of these are float32, q and k too.

    Args:
        tokens: From `prepare`.
        mechanism: The row of the table.

    Returns:
        Output [B, h, N, Dv] in the accumulation type, epilogue and all, and the state.
    """
    assert tokens.q is not None
    q_features = mechanism.phi_q(tokens.q, tokens.powers).contiguous()
    query = mean_query(q_features, tokens) if mechanism.has_global_query else None
    state = attention_state(tokens, mechanism, query)
    return read_state(q_features, state, tokens, mechanism), state


def linear_attention(q: Tensor, k: Tensor, v: Tensor, mechanism: Mechanism, terms: Terms) -> Tensor:
    """Linear attention, [B, N, h, D] in and out; see `vitlinear.ops.linear_attention`."""
    with without_autocast(q):
        tokens = prepare(q, k, v, mechanism, terms, own=keeps_nothing())
        out, _ = linear_attention_forward(tokens, mechanism)
        return saturate(out.transpose(1, 2), q.dtype).to(q.dtype)


def linear_attention_state(
    k: Tensor, v: Tensor, mechanism: Mechanism, terms: Terms
) -> LinearAttentionState:
    """The state of keys and values; see `vitlinear.ops.linear_attention_state`."""
    with without_autocast(k):
        tokens = prepare(None, k, v, mechanism, terms, own=keeps_nothing())
        return attention_state(tokens, mechanism)


def read_linear_attention_state(
    q: Tensor, state: LinearAttentionState, mechanism: Mechanism, terms: Terms
) -> Tensor:
    """A read of a given state; see `vitlinear.ops.read_linear_attention_state`."""
    with without_autocast(q):
        tokens = prepare(q, None, None, mechanism, terms, own=keeps_nothing())
        out = read(tokens, state, mechanism)
        return saturate(out.transpose(1, 2), q.dtype).to(q.dtype)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    """Rotary softmax attention on SDPA, [B, N, h, D] in and out.

    Of the terms it takes position tables and padding mask. Only the rotation runs in the
    accumulation type; SDPA's fused kernels take the input type and accumulate in float32
    themselves. They have no second derivative; their plain form, under
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``, has.
    """
    with without_autocast(q):
        return _softmax_attention(q, k, v, terms)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    dtype = q.dtype
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if terms.rotary is not None:
        table = table_of_heads(terms.rotary, "rotary", q.shape[1], q.shape[3])
        table = table.to(accumulation_dtype(dtype))
        q, k = (rotate(x.to(table.dtype), table).to(dtype) for x in (q, k))
    if terms.key_padding_mask is None:
        return cpu.sdpa(q, k, v)

    padded = terms.key_padding_mask[:, None, :, None]
    q, k, v = (x.masked_fill(padded, 0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_keys(~padded).transpose(-1, -2))
    return out.masked_fill(padded, 0).transpose(1, 2)
