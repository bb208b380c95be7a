"""States and reads of them by the fused kernels or by the formulas; as `execution`, no autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backward as formulas
from . import eager
from .attention_state import GivenGradients, LinearAttentionState, StateGradients
from .execution import by_kernels, kernels_for, tell, to_layout
from .mechanisms import Mechanism
from .terms import Terms


def state_forward(
    k: Tensor,
    v: Tensor,
    mechanism: Mechanism,
    terms: Terms,
    backend: str,
    memo: dict[str, Any] | None = None,
) -> LinearAttentionState:
    """The state of keys and values, [B, N, h, D] and [B, N, h, Dv]; memo as in `execution`."""
    state: LinearAttentionState | None = by_kernels(
        lambda kernels: kernels.state_forward(k, v, mechanism, terms, memo),
        backend, k, v.shape[-1], mechanism, terms,
    )  # fmt: skip
    if state is not None:
        return state
    with eager.without_autocast(k):
        tokens = eager.prepare(None, k, v, mechanism, terms, own=True)
        return eager.attention_state(tokens, mechanism)


def state_backward(
    grads: LinearAttentionState,
    k: Tensor,
    v: Tensor,
    mechanism: Mechanism,
    terms: Terms,
    logsumexp: Tensor | None,
    backend: str,
    memo: dict[str, Any] | None = None,
) -> StateGradients:
    """Gradients of what a state is made of, from those of the state and its logsumexp."""
    found: StateGradients | None = by_kernels(
        lambda kernels: kernels.state_backward(grads, k, v, mechanism, terms, logsumexp, memo),
        backend, k, v.shape[-1], mechanism, terms,
    )  # fmt: skip
    if found is not None:
        return found
    saved = LinearAttentionState(grads.state, logsumexp=logsumexp)
    with eager.without_autocast(k):
        tokens = eager.prepare(None, k, v, mechanism, terms, own=False)
        of_keys = formulas.state_backward(
            tokens, mechanism, saved, grads.state, grads.norm, grads.mean_v, grads.logsumexp
        )
    weights, like = of_keys.key_weights, terms.key_weights
    of_weights = None if weights is None or like is None else to_layout(weights, like)
    return StateGradients(
        to_layout(of_keys.k, k), to_layout(of_keys.v, v), of_keys.powers, of_weights
    )


def read_forward(
    q: Tensor,
    state: LinearAttentionState,
    mechanism: Mechanism,
    terms: Terms,
    backend: str,
    memo: dict[str, Any] | None = None,
) -> Tensor:
    """Outputs [B, N, h, Dv] of queries that read a state; samples may share it."""
    kernels = kernels_for(backend, q)
    if kernels is not None:  # as `by_kernels`, with fewer calls
        try:
            out: Tensor = kernels.read_forward(q, for_each_sample(state, q), mechanism, terms, memo)
            return out
        except Exception as error:
            tell(error, backend, q, state.state.shape[-1], mechanism, terms)
    with eager.without_autocast(q):
        tokens = eager.prepare(q, None, None, mechanism, terms, own=True)
        return to_layout(eager.read(tokens, state, mechanism), q)


def read_backward(
    grad_out: Tensor,
    q: Tensor,
    state: LinearAttentionState,
    mechanism: Mechanism,
    terms: Terms,
    backend: str,
    memo: dict[str, Any] | None = None,
) -> GivenGradients:
    """Gradients of all that a read is given."""
    given: GivenGradients | None = by_kernels(
        lambda kernels: kernels.read_backward(
            grad_out, q, for_each_sample(state, q), mechanism, terms, memo
        ),
        backend, q, state.state.shape[-1], mechanism, terms,
    )  # fmt: skip
    if given is not None:
        return given
    with eager.without_autocast(q):
        tokens = eager.prepare(q, None, None, mechanism, terms, own=False)
        grad_out = grad_out.transpose(1, 2).to(state.state.dtype)
        found = formulas.read_backward(grad_out, tokens, mechanism, state)
        grad_q, powers = formulas.query_gradients(found.features, tokens, mechanism)
    # A gate alone leaves the gradient of a lepe that is not there.
    lepe = None if found.lepe is None or terms.lepe is None else to_layout(found.lepe, q)
    gate = None if found.gate is None else to_layout(found.gate, q)
    return GivenGradients(
        to_layout(grad_q, q), found.state, found.norm, found.mean_v, found.head_scale, lepe, gate,
        powers,
    )  # fmt: skip


def for_each_sample(state: LinearAttentionState, q: Tensor) -> LinearAttentionState:
    """A state with an entry for each sample of the queries."""
    batch = q.shape[0]
    for x in state[:3]:
        if x is not None and x.shape[0] != batch:
            break
    else:
        return state
    sums, norm, mean_v = (None if x is None else x.expand(batch, -1, -1, -1) for x in state[:3])
    assert sums is not None
    return LinearAttentionState(sums, norm, mean_v)


def like(grad: Tensor | None, x: Tensor | None) -> Tensor | None:
    """A gradient in the shape and type of what it belongs to; None where there is none.

    Samples that share a state share its gradient, which is the sum over them. What is given and not
    read by the mechanism has a gradient of zero.
    """
    if x is None:
        return None
    if grad is None:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    if grad.shape != x.shape:
        grad = grad.sum_to_size(x.shape)
    return grad if grad.dtype == x.dtype else eager.saturate(grad, x.dtype).to(x.dtype)
