"""Linear attention in two steps: the state of keys and values, and queries that read a state.

The state that is read may be another one than that of the tokens, such as a learned one, or one
that a layer has changed. Both steps are those of `vitlinear.ops.linear_attention`, and their
derivatives flow through the state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import autograd_states, eager
from . import registered_states as registered_states  # registers torch.ops.vitlinear.*
from .attention import (
    MOST_KNOWN,
    Examined,
    check_derivatives,
    check_device,
    check_mechanism,
    check_tables_gradient,
    check_terms,
    check_tokens,
    chosen_for,
    examined,
    facts_of_terms,
    is_training,
    known,
    mask_of_lengths,
)
from .attention_state import LinearAttentionState
from .mechanisms import Mechanism, get_mechanism
from .precision import accumulation_dtype, in_tf32
from .rotary import RotaryTables
from .terms import Terms
from .tracing import PLAIN, is_looked_at
from .workload import Workload


def linear_attention_state(
    k: Tensor,
    v: Tensor,
    *,
    mechanism: str = "elu",
    rotary: RotaryTables | None = None,
    key_padding_mask: Tensor | None = None,
    powers: Tensor | None = None,
    key_weights: Tensor | None = None,
    backend: str = "auto",
) -> LinearAttentionState:
    """The state of a linear attention: sums over keys and values.

    With the notation of `vitlinear.ops.linear_attention`::

        S = 1/N sum_j R(w_j phi_k(k_j)) v_j^T    m = 1/N sum_j w_j phi_k(k_j)
        vbar = 1/N sum_j v_j

    Args:
        k: Keys, [B, N, h, D], as for `vitlinear.ops.linear_attention`.
        v: Values, [B, N, h, Dv]. Several groups of values that share keys can lie side by side.
        mechanism: Key in `vitlinear.ops.MECHANISMS`.
        rotary: Position tables of the keys.
        key_padding_mask: Tokens that count nowhere, as for `vitlinear.ops.linear_attention`.
        powers: Powers of a feature map that learns them, [h, D].
        key_weights: w_j of a mechanism that is given them, as for
            `vitlinear.ops.linear_attention`. A read of the state takes none.
        backend: ``auto``, ``eager``, ``library`` or ``triton``; see `vitlinear.ops.backend`.

    Returns:
        S, [B, h, F, Dv]; m and vbar where the mechanism reads them. float32, float64 for float64.

    Raises:
        ValueError: Shapes or types do not fit, a name is unknown, or the mechanism weighs keys by a
            query.
        NotImplementedError: A derivative that the registered operators do not have.
        KernelError: The backend is ``triton`` and a kernel failed.
    """
    row = get_mechanism(mechanism)
    if row.has_global_query:
        raise ValueError(
            f"{mechanism!r} weighs keys by their mean query and has no state without queries"
        )
    mask = mask_of_lengths(key_padding_mask, k)
    terms = Terms(rotary, mask, powers=powers, key_weights=key_weights)
    call = known(k, k, v, mechanism, terms) if _may_be_plain() else None
    plain = call is not None
    if call is None:
        call = examined(k, k, v, mechanism, terms)
    if (chosen := chosen_for(backend, call)) == "eager":
        return eager.linear_attention_state(k, v, row, terms)
    if plain:
        if rotary is not None and (rotary.rows.requires_grad or rotary.cols.requires_grad):
            check_tables_gradient(terms)
        return autograd_states.linear_attention_state(
            k, v, row, terms, chosen, call.work.training, call.memo
        )
    check_derivatives(terms, k, v)
    rows, cols, *_ = terms.flatten()
    flat = torch.ops.vitlinear.linear_attention_state(
        k, v, mechanism, rows, cols, mask, powers, key_weights, chosen
    )
    return LinearAttentionState.unflatten(*flat)


def read_linear_attention_state(
    q: Tensor,
    state: LinearAttentionState,
    *,
    mechanism: str = "elu",
    rotary: RotaryTables | None = None,
    key_padding_mask: Tensor | None = None,
    head_scale: Tensor | None = None,
    lepe: Tensor | None = None,
    gate: Tensor | None = None,
    powers: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Outputs of queries that read a state.

    With the notation of `vitlinear.ops.linear_attention`::

        out_i = a(z_i) R(phi_q(q_i))^T tau S + b(z_i) vbar        z_i = phi_q(q_i) . m

    Args:
        q: Queries, [B, N, h, D], as for `vitlinear.ops.linear_attention`.
        state: From `linear_attention_state`, or made of other tensors of these shapes and types;
            samples may share one, [1, h, F, Dv].
        mechanism: Key in `vitlinear.ops.MECHANISMS`. Where its factors depend on N (``l2``), that
            is the number of queries.
        rotary: Position tables of the queries.
        key_padding_mask: Queries whose output is 0.
        head_scale: tau, [h], a factor of S.
        lepe: Added to the output, [B, N, h, Dv].
        gate: Multiplies the sum of output and lepe, like it.
        powers: Powers of a feature map that learns them, [h, D].
        backend: ``auto``, ``eager``, ``library`` or ``triton``; see `vitlinear.ops.backend`.

    Returns:
        [B, N, h, Dv] in the type of q. What float16 cannot hold saturates.

    Raises:
        ValueError: Shapes or types do not fit, or a name is unknown.
        NotImplementedError: A derivative that the registered operators do not have.
        KernelError: The backend is ``triton`` and a kernel failed.
    """
    row = get_mechanism(mechanism)
    mask = None if key_padding_mask is None else mask_of_lengths(key_padding_mask, q)
    terms = Terms(rotary, mask, head_scale, lepe, gate, powers)
    call = _known(q, state, row, terms) if _may_be_plain() else None
    plain = call is not None
    if call is None:
        call = _examined(q, state, row, terms)
    if (chosen := chosen_for(backend, call)) == "eager":
        return eager.read_linear_attention_state(q, state, row, terms)
    if plain:
        if rotary is not None and (rotary.rows.requires_grad or rotary.cols.requires_grad):
            check_tables_gradient(terms)
        return autograd_states.read_linear_attention_state(
            q, state, row, terms, chosen, call.work.training, call.memo
        )
    given = (state.state, state.norm, state.mean_v)
    check_derivatives(terms, q, *given)
    out: Tensor = torch.ops.vitlinear.read_linear_attention_state(
        q, *given, mechanism, *terms.flatten()[:-1], chosen
    )
    return out


def runs_on(
    backend: str, x: Tensor, mechanism: str, terms: Terms, value_dim: int, training: bool
) -> str:
    """``eager``, or the backend that the registered operators are to be given.

    ``auto`` decides as for the attention that has these terms: its kernels are the same.

    Raises:
        ValueError: The backend is unknown, or is ``triton`` and cannot run the call.
    """
    work = Workload.of(x, mechanism, terms, training, value_dim)
    return chosen_for(backend, Examined(get_mechanism(mechanism), work))


def _may_be_plain() -> bool:
    """Whether nobody looks at each operator."""
    return not torch.compiler.is_compiling() and not is_looked_at()


def _examined(
    q: Tensor, state: LinearAttentionState, mechanism: Mechanism, terms: Terms
) -> Examined:
    """Look at a read.

    Raises:
        ValueError: Something does not fit; the message names it.
    """
    values = state.state.shape[-1]
    check_tokens(q, q, q)
    check_state(q, state, mechanism, terms.rotary is not None)
    check_mechanism(q, mechanism, terms.powers, values)
    check_terms(q, terms, mechanism.positions, values)
    training = is_training(terms, q, *state[:3])
    return Examined(mechanism, Workload.of(q, mechanism.name, terms, training, values))


_known_reads: dict[tuple[Any, ...], Examined] = {}


def _known(
    q: Tensor, state: LinearAttentionState, mechanism: Mechanism, terms: Terms
) -> Examined | None:
    """As `_examined`, which looks but once at calls that are alike; None of what is not plain."""
    sums, norm, mean_v, *_ = state
    if type(q) not in PLAIN or type(sums) not in PLAIN:
        return None
    if norm is not None and (type(norm) not in PLAIN or norm.is_neg()):
        return None
    if mean_v is not None and (type(mean_v) not in PLAIN or mean_v.is_neg()):
        return None
    if q.is_neg() or sums.is_neg():
        return None
    given = facts_of_terms(terms)
    if given is None:
        return None
    with_gradients = torch.is_grad_enabled()
    training = with_gradients and (
        q.requires_grad
        or sums.requires_grad
        or (norm is not None and norm.requires_grad)
        or (mean_v is not None and mean_v.requires_grad)
    )
    device = q.device
    key = (
        mechanism.name, device, with_gradients, training, q.dtype, q.shape, sums.dtype, sums.shape,
        sums.get_device(), given, in_tf32(q.dtype, device.type),
        None if norm is None else (norm.dtype, norm.shape, norm.get_device()),
        None if mean_v is None else (mean_v.dtype, mean_v.shape, mean_v.get_device()),
    )  # fmt: skip
    call = _known_reads.get(key)
    if call is None:
        if q.is_meta:
            return None
        if len(_known_reads) >= MOST_KNOWN:
            _known_reads.clear()
        call = _known_reads[key] = _examined(q, state, mechanism, terms)
    return call


def check_state(
    q: Tensor, state: LinearAttentionState, mechanism: Mechanism, with_positions: bool
) -> None:
    """Check that a state fits queries [B, N, h, D].

    Raises:
        ValueError: It does not; the message says why.
    """
    batch, _, heads, dim = q.shape
    rows, features = mechanism.state_dim(dim, with_positions), mechanism.feature_dim(dim)
    dtype = accumulation_dtype(q.dtype)
    values = state.state.shape[-1]
    needed = {"state": (rows, values)}
    if mechanism.reads.uses_norm:
        needed["norm"] = (1, features)
    if mechanism.reads.uses_mean:
        needed["mean_v"] = (1, values)
    for name, shape in needed.items():
        x = getattr(state, name)
        if x is None:
            raise ValueError(f"{mechanism.name!r} needs {name} in the state, and there is none")
        if x.dim() != 4 or x.shape[0] not in (batch, 1) or x.shape[1:] != (heads, *shape):
            expected = ", ".join(str(size) for size in (batch, heads, *shape))
            raise ValueError(
                f"{name} of the state must be [{expected}] for q of shape {tuple(q.shape)} and "
                f"mechanism {mechanism.name!r}, got {tuple(x.shape)}"
            )
        check_device(q.device, {f"{name} of the state": x})
        if x.dtype != dtype:
            raise ValueError(f"{name} of the state must be {dtype} for {q.dtype}, got {x.dtype}")
