"""Closed-form gradients of the operators, from the inputs and O(h D^2) of saved state.

They stand behind the registered operators (`vitlinear.ops.registered`), where autograd does not
reach; everything that depends on a token is computed anew instead of kept. Shapes and notation as
in `vitlinear.ops.eager`; g is the gradient of the output.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .attention_state import LinearAttentionState
from .eager import (
    Tokens,
    global_query_logits,
    halves,
    hide_padding,
    opposite_norm,
    opposite_state,
    seen_keys,
)
from .features import FeatureMap
from .mechanisms import Factor, Mechanism
from .rotary import encode, rotate

# Rows of the softmax matrix that stand in memory at once.
QUERY_CHUNK = 1024


class LinearGradients(NamedTuple):
    """Gradients of a linear attention, or memory for them.

    Attributes:
        q: [B, h, N, D].
        k: Likewise.
        v: [B, h, N, Dv].
        head_scale: [h]; None without a head_scale.
        lepe: Like v; None without a gate: it then is the gradient of the output.
        gate: Like v; None without a gate.
        powers: [h, D]; None without powers.
        key_weights: [B, h, N, 1 or F]; None where the mechanism takes none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    head_scale: Tensor | None
    lepe: Tensor | None
    gate: Tensor | None
    powers: Tensor | None = None
    key_weights: Tensor | None = None


class ReadGradients(NamedTuple):
    """Gradients of what a read takes.

    Attributes:
        features: Of phi(q), [B, h, N, F].
        state: Like the state, as are the next two; None for what the mechanism has not.
        norm: Of m.
        mean_v: Of vbar.
        head_scale: [h]; None without a head_scale.
        lepe: As in `LinearGradients`.
        gate: Likewise.
    """

    features: Tensor
    state: Tensor
    norm: Tensor | None
    mean_v: Tensor | None
    head_scale: Tensor | None
    lepe: Tensor | None
    gate: Tensor | None


class KeyGradients(NamedTuple):
    """Gradients of what a state is made of.

    Attributes:
        k: [B, h, N, D].
        v: [B, h, N, Dv].
        powers: [h, D]; None without powers.
        query: Of the mean query, [B, h, 1, F]; None where no query weighs the keys.
        key_weights: As in `LinearGradients`.
    """

    k: Tensor
    v: Tensor
    powers: Tensor | None
    query: Tensor | None
    key_weights: Tensor | None


def linear_attention_backward(
    grad_out: Tensor, tokens: Tokens, mechanism: Mechanism, saved: LinearAttentionState
) -> LinearGradients:
    """Gradients of everything that a linear attention takes.

    With c_j = w_j / N the output is out_i = a_i R(phi(q_i)) tau S + b_i vbar, hence::

        pass over queries   u_i  = R^T(tau S g_i)
                            dz_i = a'_i phi(q_i) . u_i + b'_i vbar . g_i
                            dphi(q_i) = a_i u_i + dz_i m
                            G = sum_i a_i R(phi(q_i)) g_i^T         dm = sum_i dz_i phi(q_i)
                            dS = tau G    dtau = <G, S>             dvbar = sum_i b_i g_i
        pass over keys      y_j  = R^T(dS v_j) + dm
                            dphi(k_j) = c_j y_j
                            dv_j = c_j dS^T R(phi(k_j)) + dvbar / N

    for weights c = softmax(s qbar . phi(k_j)), with l_j their logits::

        dl_j = c_j (phi(k_j) . y_j - sum_n c_n phi(k_n) . y_n)
        dphi(k_j) += s dl_j qbar            dphi(q_i) += (s / N) sum_j dl_j phi(k_j)

    and for a softmax of each channel, with c_j the features themselves, the same elementwise::

        dphi(k_j) = c_j (y_j - sum_n c_n y_n)

    Weights w_j that were given have the gradient phi(k_j) y_j / N, elementwise if w_j is a vector,
    and summed over the features if it is a number.

    An epilogue (out_i + lepe_i) gate_i comes first; its outputs are computed anew::

        dgate_i = g_i (out_i + lepe_i)      dlepe_i = g_i gate_i, the g_i of all of the above

    Of two reads, each has its half of g, its own a, z and dz, and its own S and m: those of the
    second have their rows exchanged, and so are their gradients.
    """
    assert tokens.q is not None
    read = read_backward(grad_out, tokens, mechanism, saved)
    of_keys = state_backward(tokens, mechanism, saved, read.state, read.norm, read.mean_v)
    if of_keys.query is not None:
        read.features.add_(of_keys.query / tokens.num_valid)
    grad_q, powers = query_gradients(read.features, tokens, mechanism)
    if powers is not None and of_keys.powers is not None:
        powers = powers + of_keys.powers
    return LinearGradients(
        grad_q, of_keys.k, of_keys.v, read.head_scale, read.lepe, read.gate, powers,
        of_keys.key_weights,
    )  # fmt: skip


def query_gradients(
    grad_features: Tensor, tokens: Tokens, mechanism: Mechanism
) -> tuple[Tensor, Tensor | None]:
    """Gradients of queries and of powers from that of phi(q)."""
    assert tokens.q is not None
    grad_q, powers = mechanism.phi_q.pull_back(tokens.q, grad_features, tokens.powers)
    if tokens.valid is not None:
        grad_q.masked_fill_(~tokens.valid, 0)
    return grad_q, None if powers is None else powers.sum((0, 2))


def read_backward(
    grad_out: Tensor, tokens: Tokens, mechanism: Mechanism, saved: LinearAttentionState
) -> ReadGradients:
    """The pass over queries of `linear_attention_backward`, but for phi itself."""
    q, table, valid, num_valid = tokens.q, tokens.table, tokens.valid, tokens.num_valid
    head_scale, lepe, gate = tokens.head_scale, tokens.lepe, tokens.gate
    assert q is not None
    state, norm, mean_v = saved.state, saved.norm, saved.mean_v
    scale = q.shape[-1] ** -0.5
    reads, positions = mechanism.reads, mechanism.positions

    if valid is not None:
        grad_out = grad_out.masked_fill(~valid, 0)
    grad_out = grad_out.contiguous()
    grad_gate = grad_lepe = None
    if gate is not None:
        grad_gate, grad_out = grad_out, grad_out * gate
        grad_lepe = grad_out
    scaled = state if head_scale is None else state * head_scale

    # In-place below only on tensors made here: it is what keeps the peak under the formula's.
    features = _own_features(mechanism.phi_q, q, tokens.powers)
    a: Factor = 1.0
    b: Factor = 0.0
    out = grad_norm = grad_mean_v = None
    if mechanism.reads_opposite:
        assert norm is not None
        scaled, norms = opposite_state(scaled), opposite_norm(norm)
        out = encode(features, table, positions) @ scaled
        z = features @ norms.transpose(-1, -2)
        a, _ = reads.factors(z, scale, num_valid)
        slope_a, _ = reads.derivatives(z, scale, num_valid)
        along = (halves(out) * halves(grad_out)).sum(-1)
        grad_z = slope_a * along
        out, grad_out = (_times(x, a) for x in (out, grad_out))
        grad = encode(grad_out @ scaled.transpose(-1, -2), table, positions, inverse=True)
        grad.add_(grad_z @ norms)
        grad_norm, exchanged = (grad_z.transpose(-1, -2) @ features).split(1, dim=-2)
        grad_norm = grad_norm + exchanged.roll(norm.shape[-1] // 2, dims=-1)
        encoded = encode(features, table, positions)
        grad_state = opposite_state(encoded.transpose(-1, -2) @ grad_out)
    else:
        grad = encode(grad_out @ scaled.transpose(-1, -2), table, positions, inverse=True)
        if reads.uses_norm:
            assert norm is not None
            z = features @ norm.transpose(-1, -2)
            a, b = reads.factors(z, scale, num_valid)
            slope_a, slope_b = reads.derivatives(z, scale, num_valid)
            grad_z = slope_a * (features * grad).sum(-1, keepdim=True)
            if reads.uses_mean:
                assert isinstance(b, Tensor) and mean_v is not None
                grad_z = grad_z + slope_b * (grad_out @ mean_v.transpose(-1, -2))
                grad_mean_v = b.transpose(-1, -2) @ grad_out
            grad.mul_(a).addcmul_(grad_z, norm)
            grad_norm = grad_z.transpose(-1, -2) @ features
        encoded = encode(features.mul_(a), table, positions)
        grad_state = encoded.transpose(-1, -2) @ grad_out
        if grad_gate is not None:
            out = encoded @ scaled
            if mean_v is not None:
                out.add_(b * mean_v)
    if grad_gate is not None:
        assert out is not None
        grad_gate = grad_gate * (out if lepe is None else out.add_(lepe))
    grad_head_scale = None
    if head_scale is not None:
        grad_head_scale = (grad_state * state).sum((0, 2, 3))
        grad_state = grad_state * head_scale
    return ReadGradients(
        grad, grad_state, grad_norm, grad_mean_v, grad_head_scale, grad_lepe, grad_gate
    )


def state_backward(
    tokens: Tokens,
    mechanism: Mechanism,
    saved: LinearAttentionState,
    grad_state: Tensor,
    grad_norm: Tensor | None,
    grad_mean_v: Tensor | None,
    grad_logsumexp: Tensor | None = None,
) -> KeyGradients:
    """The pass over keys of `linear_attention_backward`; the logsumexp may have a gradient too."""
    k, v, table, valid, num_valid = tokens.k, tokens.v, tokens.table, tokens.valid, tokens.num_valid
    assert k is not None and v is not None
    query, logsumexp = saved.query, saved.logsumexp
    scale, positions = k.shape[-1] ** -0.5, mechanism.positions
    grad_query = grad_weights = None

    features = _own_features(mechanism.phi_k, k, tokens.powers)
    y = encode(v @ grad_state.transpose(-1, -2), table, positions, inverse=True)
    if grad_norm is not None:
        y.add_(grad_norm)
    if mechanism.has_global_query:
        assert query is not None and logsumexp is not None
        logits = hide_padding(global_query_logits(query, features, scale), valid)
        weight = (logits - logsumexp).exp()
        # The mean equals <dS, S> + dm . m. Summed from the very terms that it is taken from, it
        # cancels them to the last digit, which matters when one key has all the weight.
        along = (features * y).sum(-1, keepdim=True)
        grad_logits = weight * (along - (weight * along).sum(2, keepdim=True))
        grad_query = scale * grad_logits.transpose(-1, -2) @ features
        grad_features = y.mul_(weight).addcmul_(grad_logits, scale * query)
        weighted = features.mul_(weight)
    elif mechanism.has_key_softmax:
        assert logsumexp is not None
        weighted = (hide_padding(features, valid) - logsumexp).exp()
        subtracted = (weighted * y).sum(2, keepdim=True)
        if grad_logsumexp is not None:
            subtracted = subtracted - grad_logsumexp
        grad_features = y.sub_(subtracted).mul_(weighted)
    else:
        weight = torch.ones_like(k[..., :1]) if valid is None else valid
        if tokens.key_weights is not None:
            weight = tokens.key_weights
            grad_weights = (features * y).sum_to_size(weight.shape) / num_valid
        weight = weight / num_valid
        grad_features = y.mul_(weight)
        weighted = features.mul_(weight)
    grad_v = encode(weighted, table, positions) @ grad_state
    if grad_mean_v is not None:
        grad_v.add_(grad_mean_v / num_valid)
    del features, weighted

    grad_k, powers = mechanism.phi_k.pull_back(k, grad_features, tokens.powers)
    if valid is not None:
        for grad in (grad_k, grad_v, grad_weights):
            if grad is not None:
                grad.masked_fill_(~valid, 0)
    powers = None if powers is None else powers.sum((0, 2))
    return KeyGradients(grad_k, grad_v, powers, grad_query, grad_weights)


def _times(x: Tensor, factor: Factor) -> Tensor:
    """The halves of what lies like values, each times a factor [..., 2] of its read."""
    if not isinstance(factor, Tensor):
        return x * factor
    return (halves(x) * factor.unsqueeze(-1)).flatten(-2)


def _own_features(phi: FeatureMap, x: Tensor, powers: Tensor | None) -> Tensor:
    """phi(x) in memory that nobody else holds."""
    features = phi(x.contiguous(), powers)
    return features.clone() if features is x else features


def softmax_attention_forward(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Output [B, h, N, D] and logsumexp [B, h, N] of softmax attention, chunk by chunk."""
    q, k, v, table, valid, *_ = tokens
    assert q is not None and k is not None and v is not None
    scale = q.shape[-1] ** -0.5
    q, k, v = rotate(q, table), rotate(k, table), v.contiguous()
    k = (k * scale).transpose(-1, -2)
    hidden = _hidden_keys(valid)
    outs, logsumexps = [], []
    for q_chunk in q.split(QUERY_CHUNK, dim=2):
        logits = q_chunk @ k
        if hidden is not None:
            logits = logits.masked_fill(hidden, -torch.inf)
        lse = logits.logsumexp(-1, keepdim=True)
        outs.append((logits - lse).exp() @ v)
        logsumexps.append(lse.squeeze(-1))
    out = torch.cat(outs, dim=2)
    if valid is not None:
        out = out.masked_fill(~valid, 0)
    return out, torch.cat(logsumexps, dim=2)


def softmax_attention_backward(
    grad_out: Tensor, tokens: Tokens, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each [B, h, N, D].

    With p = softmax(s q k^T): dv = p^T g, dlogits = p (g v^T - g . out), then back through the
    rotation, which is orthogonal.
    """
    q, k, v, table, valid, *_ = tokens
    assert q is not None and k is not None and v is not None
    scale = q.shape[-1] ** -0.5
    if valid is not None:
        grad_out = grad_out.masked_fill(~valid, 0)
    q, k = rotate(q, table), rotate(k, table)
    hidden = _hidden_keys(valid)
    delta = (grad_out * out).sum(-1, keepdim=True)
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    grad_qs = []
    chunks = (x.split(QUERY_CHUNK, dim=2) for x in (q, grad_out, delta, logsumexp[..., None]))
    for q_chunk, g_chunk, delta_chunk, lse in zip(*chunks, strict=True):
        logits = scale * q_chunk @ k.transpose(-1, -2)
        if hidden is not None:
            logits = logits.masked_fill(hidden, -torch.inf)
        p = (logits - lse).exp()
        grad_v += p.transpose(-1, -2) @ g_chunk
        grad_logits = scale * p * (g_chunk @ v.transpose(-1, -2) - delta_chunk)
        grad_qs.append(grad_logits @ k)
        grad_k += grad_logits.transpose(-1, -2) @ q_chunk
    grad_q = torch.cat(grad_qs, dim=2)
    grad_q, grad_k = rotate(grad_q, table, inverse=True), rotate(grad_k, table, inverse=True)
    if valid is not None:
        grad_q, grad_k, grad_v = (x.masked_fill(~valid, 0) for x in (grad_q, grad_k, grad_v))
    return grad_q, grad_k, grad_v


def _hidden_keys(valid: Tensor | None) -> Tensor | None:
    """Keys that no query may see, [B, 1, 1, N]."""
    return None if valid is None else ~seen_keys(valid).transpose(-1, -2)
