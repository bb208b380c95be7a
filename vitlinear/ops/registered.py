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

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from . import backward, eager
from .attention_state import LinearAttentionState
from .backend import KERNEL_DTYPES, report_failure
from .backward import LinearGradients
from .mechanisms import get_mechanism
from .terms import FlatTerms, Terms


def _to_layout(x: Tensor, like: Tensor) -> Tensor:
    """[B, h, N, D] in the accumulation type -> contiguous [B, N, h, D] in the input type."""
    # A copy is forced because an operator may not return a view of what it was given, and with
    # one head or one token transpose and contiguous would be exactly that.
    x = eager.saturate(x.transpose(1, 2), like.dtype)
    return torch.empty(x.shape, dtype=like.dtype, device=x.device).copy_(x)


def _kernels(backend: str, q: Tensor) -> ModuleType | None:
    """The fused kernels, where they are wanted and take this type."""
    if backend == "library" or q.dtype not in KERNEL_DTYPES:
        return None
    from . import triton  # loads Triton itself

    return triton


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
    backend: str = "library",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output [B, N, h, D], and the five tensors of a flattened `LinearAttentionState`."""
    row = get_mechanism(mechanism)
    terms = Terms.unflatten(rows, cols, key_padding_mask, head_scale, lepe, gate)
    try:
        if kernels := _kernels(backend, q):
            out, state = kernels.forward(q, k, v, row, terms)
            return out, *state.flatten()
    except torch.OutOfMemoryError:
        raise  # says nothing against the kernels, and the formulas need more
    except Exception as error:
        report_failure(error, required=backend == "triton")
    with eager.without_autocast(q):
        tokens = eager.prepare(q, k, v, row, terms, own=True)
        out, state = eager.linear_attention_forward(tokens, row)
    return _to_layout(out, q), *state.flatten()


@linear_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mechanism: str, rows: Tensor | None = None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, dim = q.shape
    row = get_mechanism(mechanism)
    features = row.feature_dim(dim)
    state_dim = row.state_dim(dim, rows is not None)
    state = q.new_empty(batch, heads, state_dim, dim, dtype=eager.accumulation_dtype(q.dtype))

    def like(exists: bool, width: int) -> Tensor | None:
        return state.new_empty(batch, heads, 1, width) if exists else None

    saved = LinearAttentionState(
        state,
        norm=like(row.reads.uses_norm, features),
        mean_v=like(row.reads.uses_mean, dim),
        query=like(row.has_global_query, features),
        logsumexp=like(row.has_key_softmax, 1 if row.has_global_query else features),
    )
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
    state: Tensor,
    norm: Tensor,
    mean_v: Tensor,
    query: Tensor,
    logsumexp: Tensor,
    backend: str = "library",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the gate in one buffer, of head_scale, and of lepe.

    The buffer is [B, N, 3, h, D], or with a gate [B, N, 4, h, D], laid out like the projection that
    q, k, v and the gate mostly are slices of: its gradient then is this very memory, or one copy of
    it. An operator may not return views of one another, so slicing is left to the autograd formula.
    The others are [h] and [B, N, h, D], empty where there is none; without a gate the gradient of
    lepe is that of the output, and is left to the autograd formula too.
    """
    row = get_mechanism(mechanism)
    terms = Terms.unflatten(rows, cols, key_padding_mask, head_scale, lepe, gate)
    saved = LinearAttentionState.unflatten(state, norm, mean_v, query, logsumexp)
    grads, grad_scale, grad_lepe = _gradient_memory(q, state, terms)
    memory = _one_by_one(grads, grad_scale, grad_lepe, terms)
    try:
        if kernels := _kernels(backend, q):
            kernels.backward(grad_out, q, k, v, row, terms, saved, memory)
            return grads, grad_scale, grad_lepe
    except torch.OutOfMemoryError:
        raise  # says nothing against the kernels, and the formulas need more
    except Exception as error:
        report_failure(error, required=backend == "triton")
    with eager.without_autocast(q):
        tokens = eager.prepare(q, k, v, row, terms, own=False)
        grad_out = grad_out.transpose(1, 2).to(state.dtype)
        found = backward.linear_attention_backward(grad_out, tokens, row, saved)
    if memory.head_scale is not None and found.head_scale is not None:
        memory.head_scale.copy_(found.head_scale)
    for name in ("q", "k", "v", "lepe", "gate"):
        into, grad = getattr(memory, name), getattr(found, name)
        if into is not None:
            into.copy_(eager.saturate(grad.transpose(1, 2), q.dtype))
    return grads, grad_scale, grad_lepe


def _gradient_memory(q: Tensor, state: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh memory for what the backward operator returns."""
    batch, length, heads, dim = q.shape
    separate = terms.lepe is not None and terms.gate is not None
    scale = state if terms.head_scale is None else terms.head_scale
    return (
        q.new_empty(batch, length, 3 if terms.gate is None else 4, heads, dim),
        scale.new_empty((0,) if terms.head_scale is None else scale.shape),
        q.new_empty(q.shape if separate else (0,)),
    )


def _one_by_one(
    grads: Tensor, grad_scale: Tensor, grad_lepe: Tensor, terms: Terms | FlatTerms
) -> LinearGradients:
    """Name what the backward operator returns: [B, N, h, D], but for the gradient of tau."""
    grad_q, grad_k, grad_v, *grad_gate = grads.unbind(2)
    return LinearGradients(
        grad_q,
        grad_k,
        grad_v,
        head_scale=None if terms.head_scale is None else grad_scale,
        lepe=None if terms.lepe is None or terms.gate is None else grad_lepe,
        gate=grad_gate[0] if grad_gate else None,
    )


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
    state: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    terms = Terms.unflatten(rows, cols, key_padding_mask, head_scale, lepe, gate)
    return _gradient_memory(q, state, terms)


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
    return _to_layout(out, q), logsumexp


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
    dtype = eager.accumulation_dtype(q.dtype)
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
    dq, dk, dv = (_to_layout(grad, q) for grad in grads)
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
    q, k, v, rows, cols, key_padding_mask, head_scale, lepe, gate, *state = ctx.saved_tensors
    terms = FlatTerms(rows, cols, key_padding_mask, head_scale, lepe, gate)
    grads, grad_scale, grad_lepe = torch.ops.vitlinear.linear_attention_backward(
        grad_out, q, k, v, ctx.mechanism, *terms, *state, ctx.backend
    )
    found = _one_by_one(grads, grad_scale, grad_lepe, terms)
    of_lepe = found.lepe
    if lepe is not None and gate is None:
        of_lepe = grad_out
        if key_padding_mask is not None:
            of_lepe = grad_out.masked_fill(key_padding_mask[..., None, None], 0)
    of_terms = FlatTerms(head_scale=found.head_scale, lepe=of_lepe, gate=found.gate)
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
    vectors = (row.reads.uses_norm + row.has_global_query) * row.feature_dim(dim)
    matrices = 2 * row.state_dim(dim, rows is not None) * dim
    return 2 * batch * length * heads * (matrices + vectors)


@register_flop_formula(torch.ops.vitlinear.linear_attention_backward)
def linear_attention_backward_flops(
    grad_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, mechanism: str, rows: Any,
    cols: Any, key_padding_mask: Any, head_scale: Any, lepe: Any, gate: Any,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Four products of N x F with F x D, and the vectors of normaliser, mean and key weights.

    With a gate one product more, for the outputs that its gradient takes.
    """
    batch, length, heads, dim = q_shape
    row = get_mechanism(mechanism)
    vectors = 2 * (row.reads.uses_norm + row.has_global_query) * row.feature_dim(dim)
    vectors += 2 * row.reads.uses_mean * dim
    matrices = (4 + (gate is not None)) * row.state_dim(dim, rows is not None) * dim
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
