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
from torch import Tensor, nn

from . import execution, packed, tracing
from .attention_state import LinearAttentionState
from .mechanisms import Mechanism
from .terms import Terms

_PLAIN = frozenset({Tensor, nn.Parameter, type(None)})


def takes(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> bool:
    """Whether a call is plain; not to be asked by what is being compiled."""
    if tracing.is_watched() or q.device.type == "meta":
        return False
    return _PLAIN.issuperset(map(type, (q, k, v, *terms.flatten())))


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, mechanism: Mechanism, terms: Terms, backend: str
) -> Tensor:
    """The attention of a plain call; arguments as `execution.forward`."""
    differentiable = (q, k, v, *terms[2:])
    if torch.is_grad_enabled():
        for x in differentiable:
            if x is not None and x.requires_grad:
                return _LinearAttention.apply(mechanism, terms, backend, *differentiable)
    return execution.forward(q, k, v, mechanism, terms, backend)[0]


class _LinearAttention(torch.autograd.Function):
    """Keeps the inputs and the state, as the registered operator does."""

    @staticmethod
    def forward(
        ctx: Any, mechanism: Mechanism, terms: Terms, backend: str,
        q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Those that the gradient is for stand apart from the terms, for autograd to see them."""
        out, state = execution.forward(q, k, v, mechanism, terms, backend)
        ctx.save_for_backward(q, k, v, *terms.flatten(), *state)
        ctx.mechanism, ctx.backend = mechanism, backend
        ctx.slices = packed.common_slices(q, k, v, terms.gate)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients in the order of the arguments of `forward`."""
        # Read once: checkpointing gives them away.
        q, k, v, *flat, state, norm, mean_v, query, logsumexp = ctx.saved_tensors
        terms = Terms.unflatten(*flat)
        saved = LinearAttentionState(state, norm, mean_v, query, logsumexp)
        if torch.is_grad_enabled() or type(grad_out) is not Tensor or tracing.is_watched(grad_out):
            returned = torch.ops.vitlinear.linear_attention_backward(
                grad_out, q, k, v, ctx.mechanism.name, *flat, *saved.flatten(), ctx.backend
            )
            memory = execution.GradientMemory.of_operator(returned, q, v, terms)
            found = execution.one_by_one(memory)
        else:
            slices = ctx.slices
            memory = execution.gradient_memory(q, v, terms, slices[0].number if slices else 0)
            found = execution.one_by_one(memory)
            if terms.gate is None:  # a slice of the buffer that is somebody else's
                found = found._replace(gate=None)
            execution.backward(grad_out, q, k, v, ctx.mechanism, terms, saved, ctx.backend, found)
            packed.mark(memory.buffer, slices, (found.q, found.k, found.v, found.gate))
        found = execution.with_lepe(found, grad_out, terms)
        return None, None, None, *found
