"""States that are returned and states that are given, as registered operators.

``linear_attention_state`` and ``read_linear_attention_state`` of ``torch.ops.vitlinear`` are the
two steps of `vitlinear.ops.states`, with closed-form gradients: each keeps its inputs alone, and
differentiates through an operator of its own. What `registered` says of its operators holds for
these too, of the argument ``backend`` as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from . import eager, execution_states
from .attention_state import LinearAttentionState
from .mechanisms import get_mechanism
from .precision import accumulation_dtype
from .terms import Terms

FlatState = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@custom_op("vitlinear::linear_attention_state", mutates_args=())
def linear_attention_state_op(
    k: Tensor,
    v: Tensor,
    mechanism: str,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    powers: Tensor | None = None,
    key_weights: Tensor | None = None,
    backend: str = "library",
) -> FlatState:
    """The five tensors of a flattened `LinearAttentionState`."""
    row = get_mechanism(mechanism)
    terms = Terms.unflatten(rows, cols, key_padding_mask, None, None, None, powers, key_weights)
    return execution_states.state_forward(k, v, row, terms, backend).flatten()


@linear_attention_state_op.register_fake
def _(
    k: Tensor,
    v: Tensor,
    mechanism: str,
    rows: Tensor | None = None,
    *_: Any,
) -> FlatState:
    return empty_state(k, v, mechanism, rows is not None).flatten()


def empty_state(k: Tensor, v: Tensor, mechanism: str, with_positions: bool) -> LinearAttentionState:
    """Memory for the state of keys and values, [B, N, h, D] and [B, N, h, Dv]."""
    batch, _, heads, dim = k.shape
    row, values = get_mechanism(mechanism), v.shape[-1]
    features, rows = row.feature_dim(dim), row.state_dim(dim, with_positions)
    state = k.new_empty(batch, heads, rows, values, dtype=accumulation_dtype(k.dtype))

    def like(exists: bool, width: int) -> Tensor | None:
        return state.new_empty(batch, heads, 1, width) if exists else None

    return LinearAttentionState(
        state,
        norm=like(row.reads.uses_norm, features),
        mean_v=like(row.reads.uses_mean, values),
        query=like(row.has_global_query, features),
        logsumexp=like(row.has_key_softmax, 1 if row.has_global_query else features),
    )


@custom_op("vitlinear::linear_attention_state_backward", mutates_args=())
def linear_attention_state_backward_op(
    grad_state: Tensor,
    grad_norm: Tensor,
    grad_mean_v: Tensor,
    grad_logsumexp: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str,
    rows: Tensor | None,
    cols: Tensor | None,
    key_padding_mask: Tensor | None,
    powers: Tensor | None,
    key_weights: Tensor | None,
    logsumexp: Tensor,
    backend: str = "library",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, powers and weights; empty for what is not there, as those of the state."""
    row = get_mechanism(mechanism)
    terms = Terms.unflatten(rows, cols, key_padding_mask, None, None, None, powers, key_weights)
    grads = LinearAttentionState.unflatten(
        grad_state, grad_norm, grad_mean_v, grad_state.new_empty(0), grad_logsumexp
    )
    saved = LinearAttentionState.unflatten(grad_state, *[grad_state.new_empty(0)] * 3, logsumexp)
    found = execution_states.state_backward(grads, k, v, row, terms, saved.logsumexp, backend)
    weights = k.new_empty(0) if found.key_weights is None else found.key_weights
    return found.k, found.v, _like(found.powers, powers, k), weights


@linear_attention_state_backward_op.register_fake
def _(
    grad_state: Tensor,
    grad_norm: Tensor,
    grad_mean_v: Tensor,
    grad_logsumexp: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str,
    rows: Tensor | None,
    cols: Tensor | None,
    key_padding_mask: Tensor | None,
    powers: Tensor | None,
    key_weights: Tensor | None,
    logsumexp: Tensor,
    backend: str = "library",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    others = _empty_like(powers, k), _empty_like(key_weights, k)
    return k.new_empty(k.shape), v.new_empty(v.shape), *others


@custom_op("vitlinear::read_linear_attention_state", mutates_args=())
def read_linear_attention_state_op(
    q: Tensor,
    state: Tensor,
    norm: Tensor | None,
    mean_v: Tensor | None,
    mechanism: str,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    head_scale: Tensor | None = None,
    lepe: Tensor | None = None,
    gate: Tensor | None = None,
    powers: Tensor | None = None,
    backend: str = "library",
) -> Tensor:
    """Output [B, N, h, Dv] of queries that read a state."""
    row = get_mechanism(mechanism)
    terms = Terms.unflatten(rows, cols, key_padding_mask, head_scale, lepe, gate, powers)
    given = LinearAttentionState(state, norm, mean_v)
    return execution_states.read_forward(q, given, row, terms, backend)


@read_linear_attention_state_op.register_fake
def _(q: Tensor, state: Tensor, *_: Any, **__: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], state.shape[-1])


@custom_op("vitlinear::read_linear_attention_state_backward", mutates_args=())
def read_linear_attention_state_backward_op(
    grad_out: Tensor,
    q: Tensor,
    state: Tensor,
    norm: Tensor | None,
    mean_v: Tensor | None,
    mechanism: str,
    rows: Tensor | None,
    cols: Tensor | None,
    key_padding_mask: Tensor | None,
    head_scale: Tensor | None,
    lepe: Tensor | None,
    gate: Tensor | None,
    powers: Tensor | None,
    backend: str = "library",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, the state, m, vbar, tau, lepe, gate and powers; empty for what is not there.

    Without a gate that of lepe is the gradient of the output, and is left to the autograd formula.
    """
    row = get_mechanism(mechanism)
    terms = Terms.unflatten(rows, cols, key_padding_mask, head_scale, lepe, gate, powers)
    given = LinearAttentionState(state, norm, mean_v)
    found = execution_states.read_backward(grad_out, q, given, row, terms, backend)
    return (
        found.q,
        _like(found.state, state, q),
        _like(found.norm, norm, q),
        _like(found.mean_v, mean_v, q),
        _like(found.head_scale, head_scale, q),
        q.new_empty(0) if found.lepe is None else found.lepe,
        q.new_empty(0) if found.gate is None else found.gate,
        _like(found.powers, powers, q),
    )


@read_linear_attention_state_backward_op.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    state: Tensor,
    norm: Tensor | None,
    mean_v: Tensor | None,
    mechanism: str,
    rows: Tensor | None,
    cols: Tensor | None,
    key_padding_mask: Tensor | None,
    head_scale: Tensor | None,
    lepe: Tensor | None,
    gate: Tensor | None,
    powers: Tensor | None,
    backend: str = "library",
) -> tuple[Tensor, ...]:
    separate = lepe if gate is not None else None
    others = (state, norm, mean_v, head_scale, separate, gate, powers)
    return q.new_empty(q.shape), *(_empty_like(x, q) for x in others)


def _empty_like(x: Tensor | None, q: Tensor) -> Tensor:
    """Contiguous memory for the gradient of x; [0] where there is none."""
    return q.new_empty(0) if x is None else x.new_empty(x.shape)


def _like(grad: Tensor | None, x: Tensor | None, q: Tensor) -> Tensor:
    """A gradient in memory, shape and type of what it belongs to; [0] where there is none.

    Samples that share a state share its gradient, which is the sum over them.
    """
    into = _empty_like(x, q)
    if x is not None and grad is not None:
        into.copy_(eager.saturate(grad.sum_to_size(x.shape), x.dtype))
    elif x is not None:
        into.zero_()  # given, and not read by this mechanism
    return into


def _save_state(ctx: Any, inputs: tuple[Any, ...], output: FlatState) -> None:
    k, v, ctx.mechanism, *terms, ctx.backend = inputs
    ctx.save_for_backward(k, v, *terms, output[-1])


def _state_gradients(
    ctx: Any, grad_state: Tensor, grad_norm: Tensor, grad_mean_v: Tensor, _: Tensor,
    grad_logsumexp: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    k, v, *terms, logsumexp = ctx.saved_tensors
    grad_k, grad_v, *others = torch.ops.vitlinear.linear_attention_state_backward(
        grad_state, grad_norm, grad_mean_v, grad_logsumexp, k, v, ctx.mechanism, *terms, logsumexp,
        ctx.backend,
    )  # fmt: skip
    of_powers, of_weights = (
        None if x is None else grad for x, grad in zip(terms[-2:], others, strict=True)
    )
    return grad_k, grad_v, None, None, None, None, of_powers, of_weights, None


def _save_read(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, state, norm, mean_v, ctx.mechanism, *terms, ctx.backend = inputs
    ctx.save_for_backward(q, state, norm, mean_v, *terms)


def _read_gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    q, state, norm, mean_v, *terms = ctx.saved_tensors
    _, _, mask, head_scale, lepe, gate, powers = terms
    grad_q, *grads = torch.ops.vitlinear.read_linear_attention_state_backward(
        grad_out, q, state, norm, mean_v, ctx.mechanism, *terms, ctx.backend
    )
    inputs = (state, norm, mean_v, head_scale, lepe, gate, powers)
    grads = [None if x is None else grad for x, grad in zip(inputs, grads, strict=True)]
    grad_state, grad_norm, grad_mean_v, grad_scale, grad_lepe, grad_gate, grad_powers = grads
    if lepe is not None and gate is None:
        hidden = None if mask is None else mask[..., None, None]
        grad_lepe = grad_out if hidden is None else grad_out.masked_fill(hidden, 0)
    return (
        grad_q, grad_state, grad_norm, grad_mean_v, None, None, None, None,
        grad_scale, grad_lepe, grad_gate, grad_powers, None,
    )  # fmt: skip


linear_attention_state_op.register_autograd(_state_gradients, setup_context=_save_state)
read_linear_attention_state_op.register_autograd(_read_gradients, setup_context=_save_read)


# Two operations for each multiply-add of the matrix products, as in `registered`.


@register_flop_formula(torch.ops.vitlinear.linear_attention_state)
def linear_attention_state_flops(
    k_shape: Any, v_shape: Any, mechanism: str, rows: Any = None, *args: Any, **kwargs: Any
) -> int:
    """The product of keys and values."""
    batch, length, heads, dim = k_shape
    state = get_mechanism(mechanism).state_dim(dim, rows is not None) * v_shape[-1]
    return 2 * batch * length * heads * state


@register_flop_formula(torch.ops.vitlinear.linear_attention_state_backward)
def linear_attention_state_backward_flops(
    state: Any, norm: Any, mean_v: Any, logsumexp: Any, k_shape: Any, v_shape: Any,
    mechanism: str, rows: Any, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """That product for each of keys and values."""
    return 2 * linear_attention_state_flops(k_shape, v_shape, mechanism, rows)


@register_flop_formula(torch.ops.vitlinear.read_linear_attention_state)
def read_linear_attention_state_flops(
    q_shape: Any, state_shape: Any, norm: Any, mean_v: Any, mechanism: str, *args: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    """The product of queries and state, and the normalisers."""
    batch, length, heads, dim = q_shape
    row = get_mechanism(mechanism)
    vectors = row.reads.uses_norm * row.read_count * row.feature_dim(dim)
    return 2 * batch * length * heads * (state_shape[-2] * state_shape[-1] + vectors)


@register_flop_formula(torch.ops.vitlinear.read_linear_attention_state_backward)
def read_linear_attention_state_backward_flops(
    grad_shape: Any, q_shape: Any, state_shape: Any, norm: Any, mean_v: Any, mechanism: str,
    rows: Any, cols: Any, key_padding_mask: Any, head_scale: Any, lepe: Any, gate: Any,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Two such products, with a gate or two reads a third, and the vectors."""
    batch, length, heads, dim = q_shape
    row = get_mechanism(mechanism)
    vectors = 2 * row.reads.uses_norm * row.feature_dim(dim)
    vectors += 2 * row.reads.uses_mean * state_shape[-1]
    if row.reads_opposite:
        vectors = 6 * row.feature_dim(dim)
    again = gate is not None or row.reads_opposite
    return 2 * batch * length * heads * ((2 + again) * state_shape[-2] * state_shape[-1] + vectors)
