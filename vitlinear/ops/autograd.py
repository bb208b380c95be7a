"""Linear attention as a plain `torch.autograd.Function`.

It runs what the registered operator runs, without the cost of dispatching a custom operator, which
is several times that of everything else that happens before the kernels are launched
(benchmarks/host_cost.py). It is for calls that nobody watches: compilers, exporters, function
transforms, modes and tensor subclasses, and derivatives of derivatives, are given the registered
operator, which they know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import execution, packed, tracing
from .attention_state import LinearAttentionState
from .mechanisms import Mechanism
from .rotary import RotaryTables
from .terms import Terms


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, mechanism: Mechanism, terms: Terms, backend: str,
    training: bool, memo: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The attention of a plain call.

    Args:
        q: Queries, as in `execution.forward`, like the others.
        k: Keys.
        v: Values.
        mechanism: The row of the table.
        terms: All that the attention is given besides.
        backend: One of those there.
        training: Whether any of these tensors wants a gradient.
        memo: As there.
    """
    if training:
        _, _, head_scale, lepe, gate, powers, key_weights = terms
        return _apply(
            mechanism, terms, backend, memo, q, k, v, head_scale, lepe, gate, powers, key_weights
        )
    return execution.forward(q, k, v, mechanism, terms, backend, False, True, memo)[0]


class _LinearAttention(torch.autograd.Function):
    """Keeps the inputs and the state, as the registered operator does."""

    @staticmethod
    def forward(
        ctx: Any, mechanism: Mechanism, terms: Terms, backend: str, memo: dict[str, Any],
        q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Those that the gradient is for stand apart from the terms, for autograd to see them."""
        out, state = execution.forward(q, k, v, mechanism, terms, backend, False, True, memo)
        ctx.mechanism, ctx.backend, ctx.memo = mechanism, backend, memo
        rotary, *others = terms
        rows, cols = rotary or (None, None)
        ctx.save_for_backward(q, k, v, rows, cols, *others, *state)
        ctx.slices = packed.common_slices(q, k, v, terms.gate)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients in the order of the arguments of `forward`."""
        # Read once: checkpointing gives them away.
        q, k, v, rows, cols, *others, state, norm, mean_v, query, logsumexp = ctx.saved_tensors
        terms = Terms(None if rows is None else RotaryTables(rows, cols), *others)
        saved = LinearAttentionState(state, norm, mean_v, query, logsumexp)
        lazy = type(grad_out) is not Tensor or grad_out.is_neg()
        if torch.is_grad_enabled() or lazy or tracing.is_watched(grad_out):
            saved = execution.with_shapes(saved, q, v, ctx.mechanism, terms)
            returned = torch.ops.vitlinear.linear_attention_backward(
                grad_out, q, k, v, ctx.mechanism.name, *terms.flatten(), *saved.flatten(),
                ctx.backend,
            )  # fmt: skip
            memory = execution.GradientMemory.of_operator(returned, q, v, terms)
            found = execution.one_by_one(memory)
        else:
            slices = ctx.slices
            memory = execution.gradient_memory(q, v, terms, slices[0].number if slices else 0)
            found = execution.one_by_one(memory)
            if terms.gate is None:  # a slice of the buffer that is somebody else's
                found = found._replace(gate=None)
            execution.backward(
                grad_out, q, k, v, ctx.mechanism, terms, saved, ctx.backend, found, ctx.memo
            )
            if slices:
                packed.mark(memory.buffer, slices, (found.q, found.k, found.v, found.gate))
        found = execution.with_lepe(found, grad_out, terms)
        return None, None, None, None, *found


# What `torch.autograd.Function.apply` calls where no transforms of torch.func are at work: whoever
# calls `linear_attention` has asked.
_apply = super(torch.autograd.Function, _LinearAttention).apply
