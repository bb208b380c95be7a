"""The attentions as registered PyTorch operators: one operator for each attention call.

``torch.ops.vitlinear.linear_attention`` and ``torch.ops.vitlinear.softmax_attention`` are opaque
to tracing, keep only q, k, v and O(h D^2) of state for backward, and differentiate through an
operator of their own. Their last argument says what computes linear attention: ``library``, the
formulas of `eager` and `backward` on any device; ``triton``, the kernels of `triton`; ``auto``, the
kernels, or the formulas where those fail.

`custom_op`, not `triton_op`: only the former passes meta tensors, opcheck, compile and export on
machines without a GPU. There is no second derivative, no forward-mode derivative and no
`torch.func.grad`: each says so when asked for, and the eager backend is the way to it. A program
that `torch.export` made with these operators in it cannot be translated to ONNX afterwards; give
the model to `torch.onnx.export` itself, which takes the eager formula.

Tensors are [B, N, h, D] with any strides; outputs are contiguous. Rotary tables and the padding
mask are optional, as in `vitlinear.ops.linear_attention`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from . import backward, eager
from .backend import KERNEL_DTYPES, report_failure
from .mechanisms import get_mechanism
from .rotary import RotaryTables


def _tables(rows: Tensor | None, cols: Tensor | None) -> RotaryTables | None:
    return None if rows is None or cols is None else RotaryTables(rows, cols)


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
    rows: Tensor | None,
    cols: Tensor | None,
    key_padding_mask: Tensor | None,
    head_scale: Tensor | None,
    lepe: Tensor | None,
    gate: Tensor | None,
    mechanism: str,
    backend: str = "library",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output [B, N, h, D], and what backward needs besides the inputs.

    That is state [B, h, F, D], norm [B, h, F], mean value [B, h, D], mean query [B, h, F] and
    logsumexp, [B, h] or [B, h, F]; see `eager.LinearAttentionState`. What the mechanism does not
    have is empty.
    """
    row = get_mechanism(mechanism)
    try:
        if kernels := _kernels(backend, q):
            options = (rows, cols, key_padding_mask, head_scale, lepe, gate)
            return kernels.forward(q, k, v, *options, row)
    except torch.OutOfMemoryError:
        raise  # says nothing against the kernels, and the formulas need more
    except Exception as error:
        report_failure(error, required=backend == "triton")
    with eager.without_autocast(q):
        tables = _tables(rows, cols)
        tokens = eager.prepare(q, k, v, tables, key_padding_mask, True, row, lepe, gate)
        out, saved = eager.linear_attention_forward(tokens, row, _widen(head_scale, tokens.q))
    state, norm, mean_v, query, logsumexp = saved

    def save(x: Tensor | None) -> Tensor:
        return state.new_empty(0) if x is None else x.squeeze(2).contiguous()

    if logsumexp is not None and row.has_global_query:
        logsumexp = logsumexp.squeeze(-1)
    return (
        _to_layout(out, q),
        state.contiguous(),
        save(norm),
        save(mean_v),
        save(query),
        save(logsumexp),
    )


def _widen(head_scale: Tensor | None, like: Tensor) -> Tensor | None:
    return None if head_scale is None else head_scale.to(like.dtype)


@linear_attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    key_padding_mask: Tensor | None,
    head_scale: Tensor | None,
    lepe: Tensor | None,
    gate: Tensor | None,
    mechanism: str,
    backend: str = "library",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, dim = q.shape
    row = get_mechanism(mechanism)
    features = row.feature_dim(dim)
    state_dim = row.state_dim(dim, rows is not None)
    state = q.new_empty(batch, heads, state_dim, dim, dtype=eager.accumulation_dtype(q.dtype))

    def like(exists: bool, *widths: int) -> Tensor:
        return state.new_empty((batch, heads, *widths) if exists else (0,))

    return (
        q.new_empty(q.shape),
        state,
        like(row.reads.uses_norm, features),
        like(row.reads.uses_mean, dim),
        like(row.has_global_query, features),
        like(row.has_key_softmax, *(() if row.has_global_query else (features,))),
    )


@custom_op("vitlinear::linear_attention_backward", mutates_args=())
def linear_attention_backward_op(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    mechanism: str,
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
    grads, grad_lepe = _gradient_memory(q, lepe, gate)
    grad_scale: Tensor | None
    try:
        if kernels := _kernels(backend, q):
            grad_scale = kernels.backward(
                *(grad_out, q, k, v, rows, cols, key_padding_mask, head_scale, lepe, gate),
                *(state, norm, mean_v, query, logsumexp, row),
                *(grads.unbind(2), grad_lepe if grad_lepe.dim() == 4 else None),
            )
            return grads, _like_scale(grad_scale, head_scale, state), grad_lepe
    except torch.OutOfMemoryError:
        raise  # says nothing against the kernels, and the formulas need more
    except Exception as error:
        report_failure(error, required=backend == "triton")
    if row.has_global_query:
        logsumexp = logsumexp.unsqueeze(-1)
    saved = eager.LinearAttentionState(
        state,
        norm.unsqueeze(2) if row.reads.uses_norm else None,
        mean_v.unsqueeze(2) if row.reads.uses_mean else None,
        query.unsqueeze(2) if row.has_global_query else None,
        logsumexp.unsqueeze(2) if row.has_key_softmax else None,
    )
    with eager.without_autocast(q):
        tables = _tables(rows, cols)
        tokens = eager.prepare(q, k, v, tables, key_padding_mask, False, row, lepe, gate)
        grad_out = grad_out.transpose(1, 2).to(state.dtype)
        found = backward.linear_attention_backward(
            grad_out, tokens, saved, row, _widen(head_scale, state)
        )
    into = [*grads.unbind(2), *([grad_lepe] if grad_lepe.dim() == 4 else [])]
    for memory, part in zip(into, found[: len(into)], strict=True):
        assert part is not None
        memory.copy_(eager.saturate(part.transpose(1, 2), q.dtype))
    return grads, _like_scale(found.head_scale, head_scale, state), grad_lepe


def _gradient_memory(q: Tensor, lepe: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fresh memory for the gradients of q, k, v and gate, and of lepe."""
    batch, length, heads, dim = q.shape
    parts, separate = (3, False) if gate is None else (4, lepe is not None)
    grads = q.new_empty(batch, length, parts, heads, dim)
    return grads, q.new_empty(q.shape if separate else (0,))


def _like_scale(grad: Tensor | None, head_scale: Tensor | None, state: Tensor) -> Tensor:
    if grad is None or head_scale is None:
        return state.new_empty(0)
    return grad.to(head_scale.dtype)


@linear_attention_backward_op.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    key_padding_mask: Tensor | None,
    head_scale: Tensor | None,
    lepe: Tensor | None,
    gate: Tensor | None,
    state: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    grads, grad_lepe = _gradient_memory(q, lepe, gate)
    none = state.new_empty(0)
    grad_scale = none if head_scale is None else head_scale.new_empty(head_scale.shape)
    return grads, grad_scale, grad_lepe


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
    with eager.without_autocast(q):
        tokens = eager.prepare(q, k, v, _tables(rows, cols), key_padding_mask, contiguous=True)
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
    with eager.without_autocast(q):
        tokens = eager.prepare(q, k, v, _tables(rows, cols), key_padding_mask, contiguous=False)
        grad_out, out = (x.transpose(1, 2).to(logsumexp.dtype) for x in (grad_out, out))
        grads = backward.softmax_attention_backward(grad_out, tokens, out, logsumexp)
    dq, dk, dv = (_to_layout(grad, q) for grad in grads)
    return dq, dk, dv


@softmax_attention_backward_op.register_fake
def _(grad_out: Tensor, q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.mechanism, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _linear_gradients(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: checkpointing gives them away
    grads, grad_scale, grad_lepe = torch.ops.vitlinear.linear_attention_backward(
        grad_out, *saved, ctx.mechanism, ctx.backend
    )
    mask, lepe, gate = (saved[i] for i in (5, 7, 8))
    grad_scale = grad_scale if ctx.needs_input_grad[6] else None
    of_lepe: Tensor | None = None if lepe is None else grad_lepe
    if lepe is not None and gate is None:
        of_lepe = grad_out if mask is None else grad_out.masked_fill(mask[..., None, None], 0)
    grad_q, grad_k, grad_v, *grad_gate = grads.unbind(2)
    of_gate = grad_gate[0] if grad_gate else None
    return grad_q, grad_k, grad_v, None, None, None, grad_scale, of_lepe, of_gate, None, None


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
    q_shape: Any, k_shape: Any, v_shape: Any, rows: Any, cols: Any, mask: Any, head_scale: Any,
    lepe: Any, gate: Any, mechanism: str, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """State, read-out and normaliser; logits of the key weights where there are any."""
    batch, length, heads, dim = q_shape
    row = get_mechanism(mechanism)
    vectors = (row.reads.uses_norm + row.has_global_query) * row.feature_dim(dim)
    matrices = 2 * row.state_dim(dim, rows is not None) * dim
    return 2 * batch * length * heads * (matrices + vectors)


@register_flop_formula(torch.ops.vitlinear.linear_attention_backward)
def linear_attention_backward_flops(
    grad_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, rows: Any, cols: Any, mask: Any,
    head_scale: Any, lepe: Any, gate: Any, state: Any, norm: Any, mean_v: Any, query: Any,
    logsumexp: Any, mechanism: str, *args: Any, **kwargs: Any,
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
    """q k^T and p v."""
    batch, length, heads, dim = q_shape
    return 4 * batch * heads * length * length * dim


@register_flop_formula(torch.ops.vitlinear.softmax_attention_backward)
def softmax_attention_backward_flops(
    grad_shape: Any, q_shape: Any, *args: Any, **kwargs: Any
) -> int:
    """The logits anew, and the four products of the gradients."""
    return softmax_attention_flops(q_shape) * 5 // 2
