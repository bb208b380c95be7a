"""States and reads of them as plain functions of autograd; when and why is told in `autograd`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import eager, execution_states, tracing
from .attention_state import LinearAttentionState
from .mechanisms import Mechanism
from .rotary import RotaryTables
from .terms import Terms


def linear_attention_state(
    k: Tensor, v: Tensor, mechanism: Mechanism, terms: Terms, backend: str,
    training: bool, memo: dict[str, Any],
) -> LinearAttentionState:  # fmt: skip
    """The state of a plain call.

    Args:
        k: Keys, as in `execution_states.state_forward`, like the others.
        v: Values.
        mechanism: The row of the table.
        terms: All that the state is given besides.
        backend: One of those there.
        training: Whether any of these tensors wants a gradient.
        memo: As in `execution.forward`.
    """
    if training:
        powers, weights = terms.powers, terms.key_weights
        return LinearAttentionState(*_state(mechanism, terms, backend, memo, k, v, powers, weights))
    return execution_states.state_forward(k, v, mechanism, terms, backend, memo)


def read_linear_attention_state(
    q: Tensor, state: LinearAttentionState, mechanism: Mechanism, terms: Terms, backend: str,
    training: bool, memo: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The read of a plain call.

    Args:
        q: Queries, as in `execution_states.read_forward`, like the others.
        state: What they read.
        mechanism: The row of the table.
        terms: All that the read is given besides.
        backend: One of those there.
        training: Whether any of these tensors wants a gradient.
        memo: As in `execution.forward`.
    """
    if training:
        _, _, head_scale, lepe, gate, powers, *_ = terms
        return _read(
            mechanism, terms, backend, memo, q, state.state, state.norm, state.mean_v,
            head_scale, lepe, gate, powers,
        )  # fmt: skip
    return execution_states.read_forward(q, state, mechanism, terms, backend, memo)


def _is_plain(*grads: Tensor | None) -> bool:
    """Whether nobody looks at what is made of these gradients."""
    if torch.is_grad_enabled() or tracing.is_watched():
        return False
    for grad in grads:
        if grad is None:
            continue
        if type(grad) is not Tensor or grad.is_neg() or tracing.stands_for_many(grad):
            return False
    return True


class _State(torch.autograd.Function):
    """Keeps keys, values and the logsumexp, as the registered operator does."""

    @staticmethod
    def forward(
        ctx: Any, mechanism: Mechanism, terms: Terms, backend: str, memo: dict[str, Any],
        k: Tensor, v: Tensor, *_: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        state = execution_states.state_forward(k, v, mechanism, terms, backend, memo)
        rows, cols = terms.rotary or (None, None)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            k, v, rows, cols, terms.key_padding_mask, terms.powers, terms.key_weights,
            state.logsumexp,
        )  # fmt: skip
        ctx.mechanism, ctx.backend, ctx.memo = mechanism, backend, memo
        ctx.shapes = [None if x is None else x.shape for x in state[:3]]
        return tuple(state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        k, v, rows, cols, mask, powers, weights, logsumexp = ctx.saved_tensors
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * 8
        state, norm, mean_v, _, of_logsumexp = grads
        if state is None or norm is None or mean_v is None:  # all that the state has
            state, norm, mean_v = (
                given[0].new_zeros(shape) if grad is None and shape is not None else grad
                for grad, shape in zip(grads[:3], ctx.shapes, strict=True)
            )
        assert state is not None
        of_state = LinearAttentionState(state, norm, mean_v, None, of_logsumexp)
        if _is_plain(*grads):
            rotary = None if rows is None else RotaryTables(rows, cols)
            terms = Terms(rotary, mask, powers=powers, key_weights=weights)
            found = execution_states.state_backward(
                of_state, k, v, ctx.mechanism, terms, logsumexp, ctx.backend, ctx.memo
            )
            grad_k, grad_v, of_powers, of_weights = found
            if of_powers is not None and powers is not None:
                of_powers = eager.saturate(of_powers, powers.dtype).to(powers.dtype)
            return None, None, None, None, grad_k, grad_v, of_powers, of_weights
        state, norm, mean_v, _, of_logsumexp = of_state.flatten()
        kept = state.new_empty(0) if logsumexp is None else logsumexp
        grad_k, grad_v, *others = torch.ops.vitlinear.linear_attention_state_backward(
            state, norm, mean_v, of_logsumexp, k, v, ctx.mechanism.name, rows, cols, mask, powers,
            weights, kept, ctx.backend,
        )  # fmt: skip
        of_powers, of_weights = (
            None if x is None else grad for x, grad in zip((powers, weights), others, strict=True)
        )
        return None, None, None, None, grad_k, grad_v, of_powers, of_weights


class _Read(torch.autograd.Function):
    """Keeps its inputs, as the registered operator does."""

    @staticmethod
    def forward(
        ctx: Any, mechanism: Mechanism, terms: Terms, backend: str, memo: dict[str, Any],
        q: Tensor, state: Tensor, norm: Tensor | None, mean_v: Tensor | None, *_: Tensor | None,
    ) -> Tensor:  # fmt: skip
        given = LinearAttentionState(state, norm, mean_v)
        rotary, *others = terms[:-1]
        rows, cols = rotary or (None, None)
        ctx.save_for_backward(q, state, norm, mean_v, rows, cols, *others)
        ctx.mechanism, ctx.backend, ctx.memo = mechanism, backend, memo
        return execution_states.read_forward(q, given, mechanism, terms, backend, memo)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, state, norm, mean_v, rows, cols, mask, head_scale, lepe, gate, powers = ctx.saved_tensors
        if _is_plain(grad_out):
            rotary = None if rows is None else RotaryTables(rows, cols)
            terms = Terms(rotary, mask, head_scale, lepe, gate, powers)
            found = execution_states.read_backward(
                grad_out, q, LinearAttentionState(state, norm, mean_v), ctx.mechanism, terms,
                ctx.backend, ctx.memo,
            )  # fmt: skip
            grads = [
                execution_states.like(grad, x)
                for grad, x in (
                    (found.state, state), (found.norm, norm), (found.mean_v, mean_v),
                    (found.head_scale, head_scale),
                )
            ] + [found.lepe, found.gate, execution_states.like(found.powers, powers)]  # fmt: skip
            grad_q = found.q
        else:
            grad_q, *returned = torch.ops.vitlinear.read_linear_attention_state_backward(
                grad_out, q, state, norm, mean_v, ctx.mechanism.name, rows, cols, mask, head_scale,
                lepe, gate, powers, ctx.backend,
            )  # fmt: skip
            inputs = (state, norm, mean_v, head_scale, lepe, gate, powers)
            grads = [None if x is None else grad for x, grad in zip(inputs, returned, strict=True)]
        if lepe is not None and gate is None:
            hidden = None if mask is None else mask[..., None, None]
            grads[4] = grad_out if hidden is None else grad_out.masked_fill(hidden, 0)
        return None, None, None, None, grad_q, *grads


# As in `autograd`.
_state = super(torch.autograd.Function, _State).apply
_read = super(torch.autograd.Function, _Read).apply
