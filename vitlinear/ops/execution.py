"""Linear attention by the fused kernels or by the formulas, forward and backward; no autograd.

What the registered operators (`registered`) and the plain autograd function (`autograd`) both run.
The argument ``backend`` is theirs: ``library``, ``triton`` or ``auto``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from vitlinear.errors import Notice

from . import backend as decisions
from . import backward as formulas
from . import eager, gpu
from .attention_state import LinearAttentionState
from .backend import KERNEL_DTYPES, report_failure
from .backward import LinearGradients
from .mechanisms import Mechanism
from .terms import FlatTerms, Terms
from .workload import Workload

T = TypeVar("T")

_triton: ModuleType | None = None


def kernels_for(backend: str, q: Tensor) -> ModuleType | None:
    """The fused kernels, where they are wanted and take this type."""
    global _triton
    if backend == "library" or q.dtype not in KERNEL_DTYPES:
        return None
    if _triton is None:
        from . import triton  # loads Triton itself

        _triton = triton
    return _triton


def by_kernels(
    run: Callable[[ModuleType], T],
    backend: str,
    x: Tensor,
    value_dim: int,
    mechanism: Mechanism,
    terms: Terms,
) -> T | None:
    """Let ``run`` take the kernels, and return its result; None where they are not wanted, or fail.

    Args:
        run: Calls a function of `triton`; its result is not None.
        backend: As above.
        x: Queries or keys, [B, N, h, D].
        value_dim: Channels of the values.
        mechanism: The row of the table.
        terms: All that the attention is given besides.

    Raises:
        KernelError: The backend is ``triton`` and a kernel failed.
    """
    try:
        if kernels := kernels_for(backend, x):
            return run(kernels)
    except Exception as error:
        tell(error, backend, x, value_dim, mechanism, terms)
    return None


def tell(
    error: Exception, backend: str, x: Tensor, value_dim: int, mechanism: Mechanism, terms: Terms
) -> None:
    """Say that kernels have failed, unless nothing may run in their place; as `by_kernels`.

    Raises:
        KernelError: The backend is ``triton``.
        OutOfMemoryError: It was that, which says nothing against the kernels: the formulas need
            more.
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    if backend != "triton" and (passing := _passing(error)):
        warnings.warn(f"the formula runs this time, {passing}", Notice, stacklevel=2)
        return
    work = Workload.of(x, mechanism.name, terms=terms, value_dim=value_dim)
    report_failure(error, backend == "triton", work)


def _passing(error: Exception) -> str:
    """The reason why an error need not come again; empty if nothing speaks for that."""
    text = decisions.describe_error(error)
    if gpu.is_capturing():
        return f"because a kernel could not be loaded into a graph that is captured: {text}"
    if "out of memory" in text:  # of the driver, for the code of a kernel
        torch.cuda.empty_cache()
        return f"because a kernel found no memory: {text}"
    return ""


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
    vectors: bool = False,
    memo: dict[str, Any] | None = None,
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
        vectors: Tensors of the state may be vectors, which `backward` takes as well; `with_shapes`
            makes tensors of them.
        memo: Of what the kernels prepare for calls like this one; empty at first.

    Raises:
        KernelError: The backend is ``triton`` and a kernel failed.
    """
    kernels = kernels_for(backend, q)
    if kernels is not None:  # as `by_kernels`, with fewer calls
        try:
            found: tuple[Tensor, LinearAttentionState] = kernels.forward(
                q, k, v, mechanism, terms, separate, vectors, memo
            )
            return found
        except Exception as error:
            tell(error, backend, q, v.shape[-1], mechanism, terms)
    with eager.without_autocast(q):
        tokens = eager.prepare(q, k, v, mechanism, terms, own=True)
        out, state = eager.linear_attention_forward(tokens, mechanism)
    return to_layout(out, q), state


def with_shapes(
    state: LinearAttentionState, q: Tensor, v: Tensor, mechanism: Mechanism, terms: Terms
) -> LinearAttentionState:
    """The state of `forward`, whose tensors have their shapes; arguments as there."""
    if state.state.dim() > 1:
        return state
    from . import triton  # whose kernels made it

    return triton.with_shapes(state, q, v, mechanism, terms)


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
    memo: dict[str, Any] | None = None,
) -> None:
    """Write the gradients into memory; arguments as `forward`, and its state.

    Raises:
        KernelError: The backend is ``triton`` and a kernel failed.
    """
    kernels = kernels_for(backend, q)
    if kernels is not None:
        try:
            kernels.backward(grad_out, q, k, v, mechanism, terms, state, memory, memo)
            return
        except Exception as error:
            tell(error, backend, q, v.shape[-1], mechanism, terms)
    state = with_shapes(state, q, v, mechanism, terms)
    with eager.without_autocast(q):
        tokens = eager.prepare(q, k, v, mechanism, terms, own=False)
        grad_out = grad_out.transpose(1, 2).to(state.state.dtype)
        found = formulas.linear_attention_backward(grad_out, tokens, mechanism, state)
    for name in ("head_scale", "powers"):
        into, grad = getattr(memory, name), getattr(found, name)
        if into is not None:
            into.copy_(eager.saturate(grad, into.dtype))
    for name in ("q", "k", "v", "lepe", "gate", "key_weights"):
        into, grad = getattr(memory, name), getattr(found, name)
        if into is not None:
            into.copy_(eager.saturate(grad.transpose(1, 2), into.dtype))


class GradientMemory(NamedTuple):
    """Memory for gradients; None where there is nothing to compute.

    Attributes:
        buffer: [B, N, 3, h, D] of q, k and v, or with a gate [B, N, 4, h, D], laid out like the
            projection that they mostly are slices of; q and k alone where values have another
            width.
        head_scale: [h].
        lepe: Like v; without a gate the gradient of lepe is that of the output.
        values: v, and the gate if there is one, where they do not fit the buffer,
            [B, N, 1 or 2, h, Dv].
        powers: [h, D].
        key_weights: [B, N, h, 1 or F].
    """

    buffer: Tensor
    head_scale: Tensor | None
    lepe: Tensor | None
    values: Tensor | None
    powers: Tensor | None
    key_weights: Tensor | None

    @classmethod
    def of_operator(
        cls, returned: tuple[Tensor, ...], q: Tensor, v: Tensor, terms: Terms
    ) -> GradientMemory:
        """The memory that the registered operator returns, with empty tensors for None."""
        buffer, scale, lepe, values, powers, key_weights = returned
        return cls(
            buffer,
            None if terms.head_scale is None else scale,
            None if terms.lepe is None or terms.gate is None else lepe,
            None if v.shape[-1] == q.shape[-1] else values,
            None if terms.powers is None else powers,
            None if terms.key_weights is None else key_weights,
        )


def gradient_memory(
    q: Tensor, v: Tensor, terms: Terms | FlatTerms, slices: int = 0
) -> GradientMemory:
    """Fresh memory for the gradients of a call.

    Args:
        q: Queries.
        v: Values.
        terms: All that the attention is given besides.
        slices: Number of slices of the projection, where that is known. Those that are not the
            attention's stay free in the buffer.
    """
    batch, length, heads, dim = q.shape
    gate, head_scale, powers = terms.gate, terms.head_scale, terms.powers
    weights = terms.key_weights
    like_values, alike = 1 if gate is None else 2, v.shape[-1] == dim and slices != 2
    return GradientMemory(
        q.new_empty((batch, length, max(2 + like_values if alike else 2, slices), heads, dim)),
        None if head_scale is None else torch.empty_like(head_scale),
        None if gate is None or terms.lepe is None else q.new_empty(v.shape),
        None if alike else q.new_empty((batch, length, like_values, heads, v.shape[-1])),
        None if powers is None else q.new_empty(powers.shape, dtype=powers.dtype),
        None if weights is None else q.new_empty(weights.shape, dtype=weights.dtype),
    )


def one_by_one(memory: GradientMemory) -> LinearGradients:
    """Name what is in the memory: [B, N, h, ...], but for the gradients of tau and powers."""
    parts = [*memory.buffer.unbind(2)]
    if memory.values is not None:
        parts += memory.values.unbind(2)
    grad_q, grad_k, grad_v, *gate = parts
    return LinearGradients(
        grad_q, grad_k, grad_v, memory.head_scale, memory.lepe, gate[0] if gate else None,
        memory.powers, memory.key_weights,
    )  # fmt: skip


def with_lepe(found: LinearGradients, grad_out: Tensor, terms: Terms) -> LinearGradients:
    """Add the gradient of lepe where nothing had to be computed for it: without a gate."""
    if terms.lepe is None or terms.gate is not None:
        return found
    mask = terms.key_padding_mask
    return found._replace(
        lepe=grad_out if mask is None else grad_out.masked_fill(mask[..., None, None], 0)
    )
