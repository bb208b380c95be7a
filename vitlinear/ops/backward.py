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
from .eager import Tokens, global_query_logits, hide_padding, seen_keys
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
        v: Likewise.
        head_scale: [h]; None without a head_scale.
        lepe: Like q; None without a gate: it then is the gradient of the output.
        gate: Like q; None without a gate.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    head_scale: Tensor | None
    lepe: Tensor | None
    gate: Tensor | None


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

    An epilogue (out_i + lepe_i) gate_i comes first; its outputs are computed anew::

        dgate_i = g_i (out_i + lepe_i)      dlepe_i = g_i gate_i, the g_i of all of the above
    """
    q, k, v, table, valid, num_valid, head_scale, lepe, gate = tokens
    assert q is not None and k is not None and v is not None
    state, norm, mean_v, query, logsumexp = saved
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
    features = _own_features(mechanism.phi_q, q)
    grad_q = encode(grad_out @ scaled.transpose(-1, -2), table, positions, inverse=True)
    a: Factor = 1.0
    b: Factor = 0.0
    grad_norm = grad_mean_v = None
    if norm is not None:
        z = features @ norm.transpose(-1, -2)
        a, b = reads.factors(z, scale, num_valid)
        slope_a, slope_b = reads.derivatives(z, scale, num_valid)
        grad_z = slope_a * (features * grad_q).sum(-1, keepdim=True)
        if mean_v is not None:
            grad_z = grad_z + slope_b * (grad_out @ mean_v.transpose(-1, -2))
            assert isinstance(b, Tensor)
            grad_mean_v = b.transpose(-1, -2) @ grad_out
        grad_q.mul_(a).addcmul_(grad_z, norm)
        grad_norm = grad_z.transpose(-1, -2) @ features
    encoded = encode(features.mul_(a), table, positions)
    grad_state = encoded.transpose(-1, -2) @ grad_out
    if grad_gate is not None:
        out = encoded @ scaled
        if mean_v is not None:
            out.add_(b * mean_v)
        grad_gate = grad_gate * (out if lepe is None else out.add_(lepe))
    del features, encoded, grad_out
    grad_head_scale = None
    if head_scale is not None:
        grad_head_scale = (grad_state * state).sum((0, 2, 3))
        grad_state = grad_state * head_scale

    features = _own_features(mechanism.phi_k, k)
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
        grad_q.add_(grad_query / num_valid)
        grad_k = y.mul_(weight).addcmul_(grad_logits, scale * query)
        weighted = features.mul_(weight)
    elif mechanism.has_key_softmax:
        assert logsumexp is not None
        weighted = (hide_padding(features, valid) - logsumexp).exp()
        grad_k = y.sub_((weighted * y).sum(2, keepdim=True)).mul_(weighted)
    else:
        weight = (torch.ones_like(k[..., :1]) if valid is None else valid) / num_valid
        grad_k = y.mul_(weight)
        weighted = features.mul_(weight)
    grad_v = encode(weighted, table, positions) @ grad_state
    if grad_mean_v is not None:
        grad_v.add_(grad_mean_v / num_valid)
    del features, weighted

    grad_q = mechanism.phi_q.vjp(q, grad_q)
    grad_k = mechanism.phi_k.vjp(k, grad_k)
    if valid is not None:
        for grad in (grad_q, grad_k, grad_v):
            grad.masked_fill_(~valid, 0)
    return LinearGradients(grad_q, grad_k, grad_v, grad_head_scale, grad_lepe, grad_gate)


def _own_features(phi: FeatureMap, x: Tensor) -> Tensor:
    """phi(x) in memory that nobody else holds."""
    features = phi.function(x.contiguous())
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
