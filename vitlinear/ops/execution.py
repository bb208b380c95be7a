"""Linear attention by the fused kernels or by the formulas, forward and backward; no autograd.

What the registered operators (`registered`) and the plain autograd function (`autograd`) both run.
The argument ``backend`` is theirs: ``library``, ``triton`` or ``auto``.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import backward as formulas
from . import eager
from .attention_state import LinearAttentionState
from .backend import KERNEL_DTYPES, report_failure
from .backward import LinearGradients
from .mechanisms import Mechanism
from .terms import FlatTerms, Terms
from .workload import Workload


def _kernels(backend: str, q: Tensor) -> ModuleType | None:
    """The fused kernels, where they are wanted and take this type."""
    if backend == "library" or q.dtype not in KERNEL_DTYPES:
        return None
    from . import triton  # loads Triton itself

    return triton


def to_layout(x: Tensor, like: Tensor) -> Tensor:
    """[B, h, N, D] in the accumulation type -> contiguous [B, N, h, D] in the input type."""
    # A copy is forced because an operator may not return a view of what it was given, and with
    # one head or one token transpose and contiguous would be exactly that.
    x = eager.saturate(x.transpose(1, 2), like.dtype)
    return torch.empty(x.shape, dtype=like.dtype, device=x.device).copy_(x)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: Mechanism,
    terms: Terms,
    backend: str,
    separate: bool = False,
) -> tuple[Tensor, LinearAttentionState]:
    """Output [B, N, h, D], contiguous, and the state.

    Args:
        q: Queries, [B, N, h, D], any strides.
        k: Keys, likewise.
        v: Values, likewise.
        mechanism: The row of the table.
        terms: All that the attention is given besides.
        backend: As above.
        separate: Give each tensor of the state memory of its own.

    Raises:
        KernelError: The backend is ``triton`` and a kernel failed.
    """
    try:
        if kernels := _kernels(backend, q):
            out, state = kernels.forward(q, k, v, mechanism, terms, separate)
            return out, state
    except torch.OutOfMemoryError:
        raise  # says nothing against the kernels, and the formulas need more
    except Exception as error:
        report_failure(error, backend == "triton", Workload.of(q, mechanism.name, terms=terms))
    with eager.without_autocast(q):
        tokens = eager.prepare(q, k, v, mechanism, terms, own=True)
        out, state = eager.linear_attention_forward(tokens, mechanism)
    return to_layout(out, q), state


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: Mechanism,
    terms: Terms,
    state: LinearAttentionState,
    backend: str,
    memory: LinearGradients,
) -> None:
    """Write the gradients into memory; arguments as `forward`, and its state.

    Raises:
        KernelError: The backend is ``triton`` and a kernel failed.
    """
    try:
        if kernels := _kernels(backend, q):
            kernels.backward(grad_out, q, k, v, mechanism, terms, state, memory)
            return
    except torch.OutOfMemoryError:
        raise  # says nothing against the kernels, and the formulas need more
    except Exception as error:
        report_failure(error, backend == "triton", Workload.of(q, mechanism.name, terms=terms))
    with eager.without_autocast(q):
        tokens = eager.prepare(q, k, v, mechanism, terms, own=False)
        grad_out = grad_out.transpose(1, 2).to(state.state.dtype)
        found = formulas.linear_attention_backward(grad_out, tokens, mechanism, state)
    if memory.head_scale is not None and found.head_scale is not None:
        memory.head_scale.copy_(found.head_scale)
    for name in ("q", "k", "v", "lepe", "gate"):
        into, grad = getattr(memory, name), getattr(found, name)
        if into is not None:
            into.copy_(eager.saturate(grad.transpose(1, 2), q.dtype))


def gradient_memory(
    q: Tensor, terms: Terms | FlatTerms
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Fresh memory for gradients: of q, k, v and the gate in one buffer, of tau, of lepe.

    The buffer is [B, N, 3, h, D], or with a gate [B, N, 4, h, D], laid out like the projection that
    q, k, v and the gate mostly are slices of. The others are None where there is nothing to
    compute: without a gate the gradient of lepe is that of the output.
    """
    batch, length, heads, dim = q.shape
    gate, head_scale = terms.gate, terms.head_scale
    return (
        q.new_empty((batch, length, 3 if gate is None else 4, heads, dim)),
        None if head_scale is None else torch.empty_like(head_scale),
        None
        if gate is None or terms.lepe is None
        else torch.empty_like(q, memory_format=torch.contiguous_format),
    )


def one_by_one(
    grads: Tensor, grad_scale: Tensor | None, grad_lepe: Tensor | None
) -> LinearGradients:
    """Name what `gradient_memory` returns: [B, N, h, D], but for the gradient of tau."""
    grad_q, grad_k, grad_v, *grad_gate = grads.unbind(2)
    return LinearGradients(
        grad_q, grad_k, grad_v, grad_scale, grad_lepe, grad_gate[0] if grad_gate else None
    )


def with_lepe(found: LinearGradients, grad_out: Tensor, terms: Terms) -> LinearGradients:
    """Add the gradient of lepe where nothing had to be computed for it: without a gate."""
    if terms.lepe is None or terms.gate is not None:
        return found
    mask = terms.key_padding_mask
    return found._replace(
        lepe=grad_out if mask is None else grad_out.masked_fill(mask[..., None, None], 0)
    )
