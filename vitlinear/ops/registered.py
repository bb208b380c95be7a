"""The attentions as registered PyTorch operators: one operator for each attention call.

``torch.ops.vitlinear.linear_attention`` and ``torch.ops.vitlinear.softmax_attention`` are opaque
to tracing, keep only q, k, v and O(h D^2) of state for backward, and differentiate through an
operator of their own. The argument ``backend`` says how linear attention is computed: ``library``,
the formulas of `eager` and `backward` on any device; ``triton``, the kernels of `triton`; ``auto``,
the kernels, or the formulas where those fail.

`custom_op`, not `triton_op`: only the former passes meta tensors, opcheck, compile and export on
machines without a GPU. There is no second derivative, no forward-mode derivative and no
`torch.func.grad`: each says so when asked for, and the eager backend is the way to it. A program
that `torch.export` made with these operators in it cannot be translated to ONNX afterwards; give
the model to `torch.onnx.export` itself, which takes the eager formula.

Tensors are [B, N, h, D] with any strides; outputs are contiguous. Optional terms are as in
`vitlinear.ops.linear_attention`, the position tables as two tensors (`terms.FlatTerms`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from . import backward, eager, execution
from .attention_state import LinearAttentionState
from .mechanisms import get_mechanism
from .precision import accumulation_dtype
from .registered_states import empty_state
from .terms import FlatTerms, Terms


@custom_op("vitlinear::linear_attention", mutates_args=())
def linear_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    head_scale: Tensor | None = None,
    lepe: Tensor | None = None,
    gate: Tensor | None = None,
    powers: Tensor | None = None,
    key_weights: Tensor | None = None,
    backend: str = "library",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output [B, N, h, D], and the five tensors of a flattened `LinearAttentionState`."""
    row = get_mechanism(mechanism)
    terms = Terms.unflatten(
        rows, cols, key_padding_mask, head_scale, lepe, gate, powers, key_weights
    )
    out, state = execution.forward(q, k, v, row, terms, backend, separate=True)
    return out, *state.flatten()


@linear_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mechanism: str, rows: Tensor | None = None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    saved = empty_state(q, v, mechanism, rows is not None)
    return q.new_empty(v.shape), *saved.flatten()


@custom_op("vitlinear::linear_attention_backward", mutates_args=())
def linear_attention_backward_op(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str,
    rows: Tensor | None,
    cols: Tensor | None,
    key_padding_mask: Tensor | None,
    head_scale: Tensor | None,
    lepe: Tensor | None,
    gate: Tensor | None,
    powers: Tensor | None,
    key_weights: Tensor | None,
    state: Tensor,
    norm: Tensor,
    mean_v: Tensor,
    query: Tensor,
    logsumexp: Tensor,
    backend: str = "library",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the gate in one or two buffers, and of the other terms.

    As `execution.gradient_memory` has them, and empty for None. An operator may not return views of
    one another, so slicing the buffer is left to the autograd formula.
    """
    row = get_mechanism(mechanism)
    terms = Terms.unflatten(
        rows, cols, key_padding_mask, head_scale, lepe, gate, powers, key_weights
    )
    saved = LinearAttentionState.unflatten(state, norm, mean_v, query, logsumexp)
    memory = execution.gradient_memory(q, v, terms)
    into = execution.one_by_one(memory)
    execution.backward(grad_out, q, k, v, row, terms, saved, backend, into)
    return _returned(state, memory)


Returned = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _returned(state: Tensor, memory: execution.GradientMemory) -> Returned:
    """Memory of gradients as the operator returns it."""
    buffer, scale, lepe, values, powers, key_weights = (
        state.new_empty(0) if x is None else x for x in memory
    )
    return buffer, scale, lepe, values, powers, key_weights


@linear_attention_backward_op.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str,
    rows: Tensor | None,
    cols: Tensor | None,
    key_padding_mask: Tensor | None,
    head_scale: Tensor | None,
    lepe: Tensor | None,
    gate: Tensor | None,
    powers: Tensor | None,
    key_weights: Tensor | None,
    state: Tensor,
    *others: Any,
) -> Returned:
    terms = Terms.unflatten(
        rows, cols, key_padding_mask, head_scale, lepe, gate, powers, key_weights
    )
    return _returned(state, execution.gradient_memory(q, v, terms))


@custom_op("vitlinear::softmax_attention", mutates_args=())
def softmax_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    key_padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, N, h, D] and logsumexp [B, h, N] of rotary softmax attention."""
    terms = Terms.unflatten(rows, cols, key_padding_mask)
    with eager.without_autocast(q):
        tokens = eager.prepare(q, k, v, None, terms, own=True)
        out, logsumexp = backward.softmax_attention_forward(tokens)
    return execution.to_layout(out, q), logsumexp


@softmax_attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    key_padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    dtype = accumulation_dtype(q.dtype)
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=dtype)


@custom_op("vitlinear::softmax_attention_backward", mutates_args=())
def softmax_attention_backward_op(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    key_padding_mask: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    terms = Terms.unflatten(rows, cols, key_padding_mask)
    with eager.without_autocast(q):
        tokens = eager.prepare(q, k, v, None, terms, own=False)
        grad_out, out = (x.transpose(1, 2).to(logsumexp.dtype) for x in (grad_out, out))
        grads = backward.softmax_attention_backward(grad_out, tokens, out, logsumexp)
    dq, dk, dv = (execution.to_layout(grad, q) for grad in grads)
    return dq, dk, dv


@softmax_attention_backward_op.register_fake
def _(grad_out: Tensor, q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, ctx.mechanism, *terms, ctx.backend = inputs
    _, *state = output
    ctx.save_for_backward(q, k, v, *terms, *state)


def _linear_gradients(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    # Read once: checkpointing gives them away.
    q, k, v, *flat, state, norm, mean_v, query, logsumexp = ctx.saved_tensors
    terms = Terms.unflatten(*flat)
    returned = torch.ops.vitlinear.linear_attention_backward(
        grad_out, q, k, v, ctx.mechanism, *flat, state, norm, mean_v, query, logsumexp, ctx.backend
    )
    found = execution.one_by_one(execution.GradientMemory.of_operator(returned, q, v, terms))
    found = execution.with_lepe(found, grad_out, terms)
    of_terms = FlatTerms(None, None, None, *found[3:])
    return found.q, found.k, found.v, None, *of_terms, None


def _save_softmax(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _softmax_gradients(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.vitlinear.softmax_attention_backward(grad_out, *ctx.saved_tensors)
    return *grads, None, None, None


linear_attention_op.register_autograd(_linear_gradients, setup_context=_save_linear)
softmax_attention_op.register_autograd(_softmax_gradients, setup_context=_save_softmax)


# Matrix products only, two operations for each multiply-add, as PyTorch's own counter does.


@register_flop_formula(torch.ops.vitlinear.linear_attention)
def linear_attention_flops(
    q_shape: Any, k_shape: Any, v_shape: Any, mechanism: str, rows: Any = None,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """State, read-out and normaliser; logits of the key weights where there are any."""
    batch, length, heads, dim = q_shape
    row = get_mechanism(mechanism)
    vectors = (row.reads.uses_norm * row.read_count + row.has_global_query) * row.feature_dim(dim)
    matrices = 2 * row.state_dim(dim, rows is not None) * v_shape[-1]
    return 2 * batch * length * heads * (matrices + vectors)


@register_flop_formula(torch.ops.vitlinear.linear_attention_backward)
def linear_attention_backward_flops(
    grad_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, mechanism: str, rows: Any,
    cols: Any, key_padding_mask: Any, head_scale: Any, lepe: Any, gate: Any, powers: Any,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Four products of N x F with F x D, and the vectors of normaliser, mean and key weights.

    With a gate one product more, for the outputs that its gradient takes; two reads take it anyway.
    """
    batch, length, heads, dim = q_shape
    row, values = get_mechanism(mechanism), v_shape[-1]
    vectors = 2 * (row.reads.uses_norm + row.has_global_query) * row.feature_dim(dim)
    vectors += 2 * row.reads.uses_mean * values
    again = gate is not None or row.reads_opposite
    if row.reads_opposite:  # normalisers and their gradients, as products of two columns
        vectors = 6 * row.feature_dim(dim)
    matrices = (4 + again) * row.state_dim(dim, rows is not None) * values
    return 2 * batch * length * heads * (matrices + vectors)


@register_flop_formula(torch.ops.vitlinear.softmax_attention)
def softmax_attention_flops(q_shape: Any, *args: Any, **kwargs: Any) -> int:
    """The products q k^T and p v."""
    batch, length, heads, dim = q_shape
    return 4 * batch * heads * length * length * dim


@register_flop_formula(torch.ops.vitlinear.softmax_attention_backward)
def softmax_attention_backward_flops(
    grad_shape: Any, q_shape: Any, *args: Any, **kwargs: Any
) -> int:
    """The logits anew, and the four products of the gradients."""
    return softmax_attention_flops(q_shape) * 5 // 2
