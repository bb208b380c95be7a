"""The attentions as registered PyTorch operators: one operator for each attention call.

``torch.ops.vitlinear.linear_attention`` and ``torch.ops.vitlinear.softmax_attention`` are opaque
to tracing, keep only q, k, v and O(h D^2) of state for backward, and differentiate through an
operator of their own. They are where GPU kernels attach (``register_kernel("cuda")``); on every
other device they run the formulas of `eager` and `backward`.

`custom_op`, not `triton_op`: only the former passes meta tensors, opcheck, compile and export on
machines without a GPU. There is no second derivative, no forward-mode derivative and no
`torch.func.grad`: each says so when asked for, and the eager backend is the way to it. A program
that `torch.export` made with these operators in it cannot be translated to ONNX afterwards; give
the model to `torch.onnx.export` itself, which takes the eager formula.

Tensors are [B, N, h, D] with any strides; outputs are contiguous. Rotary tables and the padding
mask are optional, as in `vitlinear.ops.linear_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from . import backward, eager
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


@custom_op("vitlinear::linear_attention", mutates_args=())
def linear_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    key_padding_mask: Tensor | None,
    mechanism: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output [B, N, h, D], then state [B, h, D, D], norm, mean query [B, h, D], logsumexp [B, h].

    The last two are empty for mechanisms that do not weigh keys.
    """
    with eager.without_autocast(q):
        tokens = eager.prepare(q, k, v, _tables(rows, cols), key_padding_mask, contiguous=True)
        out, saved = eager.linear_attention_forward(tokens, get_mechanism(mechanism))
    none = saved.state.new_empty(0)
    return (
        _to_layout(out, q),
        saved.state.contiguous(),
        saved.norm.squeeze(2).contiguous(),
        none if saved.query is None else saved.query.squeeze(2).contiguous(),
        none.clone() if saved.logsumexp is None else saved.logsumexp.flatten(1).contiguous(),
    )


@linear_attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    key_padding_mask: Tensor | None,
    mechanism: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, dim = q.shape
    weighs = get_mechanism(mechanism).weighs_keys
    state = q.new_empty(batch, heads, dim, dim, dtype=eager.accumulation_dtype(q.dtype))
    return (
        q.new_empty(q.shape),
        state,
        state.new_empty(batch, heads, dim),
        state.new_empty((batch, heads, dim) if weighs else (0,)),
        state.new_empty((batch, heads) if weighs else (0,)),
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
    state: Tensor,
    norm: Tensor,
    query: Tensor,
    logsumexp: Tensor,
    mechanism: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    row = get_mechanism(mechanism)
    saved = eager.LinearAttentionState(
        state,
        norm.unsqueeze(2),
        query.unsqueeze(2) if row.weighs_keys else None,
        logsumexp[..., None, None] if row.weighs_keys else None,
    )
    with eager.without_autocast(q):
        tokens = eager.prepare(q, k, v, _tables(rows, cols), key_padding_mask, contiguous=False)
        grad_out = grad_out.transpose(1, 2).to(state.dtype)
        grads = backward.linear_attention_backward(grad_out, tokens, saved, row)
    dq, dk, dv = (_to_layout(grad, q) for grad in grads)
    return dq, dk, dv


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


def _fake_gradients(grad_out: Tensor, q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


linear_attention_backward_op.register_fake(_fake_gradients)
softmax_attention_backward_op.register_fake(_fake_gradients)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.mechanism = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _linear_gradients(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.vitlinear.linear_attention_backward(
        grad_out, *ctx.saved_tensors, ctx.mechanism
    )
    return *grads, None, None, None, None


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
    q_shape: Any, k_shape: Any, v_shape: Any, rows: Any, cols: Any, mask: Any, mechanism: str,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """State, read-out and normaliser; logits of the key weights where there are any."""
    batch, length, heads, dim = q_shape
    vectors = 2 if get_mechanism(mechanism).weighs_keys else 1
    return 2 * batch * length * heads * dim * (2 * dim + vectors)


@register_flop_formula(torch.ops.vitlinear.linear_attention_backward)
def linear_attention_backward_flops(
    grad_shape: Any, q_shape: Any, *args: Any, **kwargs: Any
) -> int:
    """Four products of N x D with D x D, and the vectors of normaliser and key weights."""
    batch, length, heads, dim = q_shape
    vectors = 4 if get_mechanism(args[-1]).weighs_keys else 2
    return 2 * batch * length * heads * dim * (4 * dim + vectors)


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
