"""Closed-form gradients of the operators, from the inputs and O(h D^2) of saved state.

They stand behind the registered operators (`vitlinear.ops.library`), where autograd does not
reach; everything that depends on a token is computed anew instead of kept. Shapes and notation as
in `vitlinear.ops.eager`; g is the gradient of the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .eager import LinearAttentionState, Tokens, global_query_logits, seen_keys
from .mechanisms import Mechanism
from .rotary import rotate

# Rows of the softmax matrix that stand in memory at once.
QUERY_CHUNK = 1024


def linear_attention_backward(
    grad_out: Tensor, tokens: Tokens, saved: LinearAttentionState, mechanism: Mechanism
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each [B, h, N, D].

    With r_i = 1 / (z_i + eps) and c_j = w_j / N the output is out_i = r_i R(phi(q_i)) S, hence::

        pass over queries   u_i  = R^T(S g_i)                       dz_i = -r_i^2 phi(q_i) . u_i
                            dphi(q_i) = r_i u_i + dz_i m
                            dS = sum_i r_i R(phi(q_i)) g_i^T        dm = sum_i dz_i phi(q_i)
        pass over keys      y_j  = R^T(dS v_j) + dm
                            dphi(k_j) = c_j y_j                     dv_j = c_j dS^T R(phi(k_j))

    and for weights c = softmax(s qbar . phi(k_j)), with l_j their logits::

        dl_j = c_j (phi(k_j) . y_j - sum_n c_n phi(k_n) . y_n)
        dphi(k_j) += s dl_j qbar            dphi(q_i) += (s / N) sum_j dl_j phi(k_j)
    """
    q, k, v, table, valid, num_valid = tokens
    state, norm, query, logsumexp = saved
    phi = mechanism.phi

    if valid is not None:
        grad_out = grad_out.masked_fill(~valid, 0)
    grad_out = grad_out.contiguous()

    # In-place below only on tensors made here: it is what keeps the peak under the formula's.
    features = phi.function(q.contiguous())
    inverse_normaliser = (features @ norm.transpose(-1, -2) + mechanism.eps).reciprocal()
    grad_q = rotate(grad_out @ state.transpose(-1, -2), table, inverse=True).mul_(
        inverse_normaliser
    )
    grad_normaliser = -inverse_normaliser * (features * grad_q).sum(-1, keepdim=True)
    grad_q.addcmul_(grad_normaliser, norm)
    grad_norm = grad_normaliser.transpose(-1, -2) @ features
    grad_state = rotate(features.mul_(inverse_normaliser), table).transpose(-1, -2) @ grad_out
    del features, grad_out

    features = phi.function(k.contiguous())
    y = rotate(v @ grad_state.transpose(-1, -2), table, inverse=True).add_(grad_norm)
    if mechanism.weighs_keys:
        assert query is not None and logsumexp is not None
        weight = (global_query_logits(query, features, valid) - logsumexp).exp()
        # The mean equals <dS, S> + dm . m. Summed from the very terms that it is taken from, it
        # cancels them to the last digit, which matters when one key has all the weight.
        along = (features * y).sum(-1, keepdim=True)
        grad_logits = weight * (along - (weight * along).sum(2, keepdim=True))
        scale = features.shape[-1] ** -0.5
        grad_query = scale * grad_logits.transpose(-1, -2) @ features
        grad_q.add_(grad_query / num_valid)
        grad_k = y.mul_(weight).addcmul_(grad_logits, scale * query)
    else:
        weight = (torch.ones_like(k[..., :1]) if valid is None else valid) / num_valid
        grad_k = y.mul_(weight)
    grad_v = rotate(features.mul_(weight), table) @ grad_state
    del features

    grad_q.mul_(phi.derivative(q))
    grad_k.mul_(phi.derivative(k))
    if valid is not None:
        for grad in (grad_q, grad_k, grad_v):
            grad.masked_fill_(~valid, 0)
    return grad_q, grad_k, grad_v


def softmax_attention_forward(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Output [B, h, N, D] and logsumexp [B, h, N] of softmax attention, chunk by chunk."""
    q, k, v, table, valid, _ = tokens
    scale = q.shape[-1] ** -0.5
    q, k = rotate(q, table), rotate(k, table)
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
    q, k, v, table, valid, _ = tokens
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
