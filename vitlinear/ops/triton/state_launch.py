"""Launches for a state by itself and for a read by itself, forward and backward.

The kernels are those that `launch` runs one after the other where no single one does everything.
Tokens are [B, N, h, D] with any strides, states contiguous with one entry for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention_state import GivenGradients, LinearAttentionState, StateGradients
from ..mechanisms import Mechanism
from ..terms import Terms
from . import tuning
from .calls import Call, Memo, Sums, remembered
from .launch import Extras, add_share, aligned, on_device, strided


def state_forward(
    k: Tensor, v: Tensor, mechanism: Mechanism, terms: Terms, memo: Memo | None = None
) -> LinearAttentionState:
    """The state of keys and values, each tensor of it in memory of its own; memo as in `launch`."""
    call = remembered(memo, "forward", k, v, mechanism, terms)
    kept: list[Any] = call.kept.separate()
    state = LinearAttentionState(*kept)
    if not call.size:
        return state
    tables, mask, counts, powers, _, width = Extras.of(terms, call)
    fixed, sums, parts = tuning.is_fixed(), state[:3], state
    if call.merging:
        parts = _of_splits(call)
    with on_device(call):
        for part in call.slices:
            into = part.of_sums(*parts[:3])
            part.state(
                fixed, strided(k), strided(part.of(v)), strided(terms.key_weights), tables, mask,
                counts, powers, None, into, parts.logsumexp, call.length, width, call.heads,
                call.summing.chunk, call.scale,
            )  # fmt: skip
            if call.merging:
                part.merge(into, part.of_sums(*sums), parts.logsumexp, state.logsumexp)
    return state


def state_backward(
    grads: LinearAttentionState,
    k: Tensor,
    v: Tensor,
    mechanism: Mechanism,
    terms: Terms,
    logsumexp: Tensor | None,
    memo: Memo | None = None,
) -> StateGradients:
    """Gradients of keys, values, powers, and weights of keys.

    Args:
        grads: Of all that the state holds.
        k: Keys, as in the forward pass.
        v: Values, as in the forward pass.
        mechanism: The row of the table.
        terms: As in the forward pass.
        logsumexp: From the forward pass; None without a softmax over keys.
        memo: As in `launch.forward`.
    """
    call = remembered(memo, "backward", k, v, mechanism, terms)
    grad_k, grad_v = _like(k), _like(v)
    powers, shares = _of_powers(k, terms, call.wide.splits)
    weights, weighing, grad_weights = terms.key_weights, None, None
    if weights is not None:
        grad_weights = _like(weights)
        weighing = strided(weights), strided(grad_weights)
    if not call.size:
        for x in (powers, grad_weights):
            if x is not None:
                x.zero_()
        return StateGradients(grad_k, grad_v, powers, grad_weights)
    extras, fixed = Extras.of(terms, call), tuning.is_fixed()
    options = (extras.tables, extras.mask, extras.counts, extras.powers, None)
    state, norm, mean_value = _aligned(grads, call)
    mean = mean_parts = None
    if logsumexp is not None:
        mean_parts = _split(call.wide.splits, logsumexp)
        mean = torch.empty_like(logsumexp)
    sizes = (call.length, extras.width, call.heads, call.wide.chunk)
    with on_device(call):
        for number, part in enumerate(call.slices):
            if number == 1 and norm is not None:
                norm = torch.zeros_like(norm)  # once, not with each slice of the values
            sums, keys, values = (
                part.of_sums(state, norm, mean_value),
                strided(k),
                strided(part.of(v)),
            )
            if mean is not None:
                part.key_mean(
                    fixed, keys, values, *options, None, logsumexp, sums, mean_parts, *sizes,
                    call.scale,
                )  # fmt: skip
                part.sum_statistics(mean_parts, mean)
                if number == 0 and grads.logsumexp is not None:
                    mean.sub_(grads.logsumexp)
            part.key(
                fixed, keys, values, weighing, strided(grad_k), strided(part.of(grad_v)), *options,
                None, logsumexp, sums, mean, None, shares, *sizes, call.scale,
            )  # fmt: skip
            if powers is not None and shares is not None:
                add_share(powers, shares, (0, 1), part)
    return StateGradients(grad_k, grad_v, powers, grad_weights)


def read_forward(
    q: Tensor,
    state: LinearAttentionState,
    mechanism: Mechanism,
    terms: Terms,
    memo: Memo | None = None,
) -> Tensor:
    """Outputs of queries that read a state, contiguous; memo as in `launch.forward`."""
    call = remembered(memo, "forward", q, state.state, mechanism, terms)
    values = call.plan.values
    out = _like(q) if values == call.plan.head_dim else q.new_empty((*q.shape[:3], values))
    if not call.size:
        return out
    tables, mask, counts, powers, head_scale, width = Extras.of(terms, call)
    fixed, sums = tuning.is_fixed(), _aligned(state, call)
    _, _, _, lepe, gate, *_ = terms
    with on_device(call):
        for part in call.slices:
            epilogue = (strided(part.of(lepe)), strided(part.of(gate)))
            part.read.runs[fixed](
                strided(q), strided(part.of(out)), epilogue, tables, mask, counts, powers,
                head_scale, part.of_sums(*sums), call.length, width, call.heads, call.wide.chunk,
                call.scale,
            )  # fmt: skip
    return out


def read_backward(
    grad_out: Tensor,
    q: Tensor,
    state: LinearAttentionState,
    mechanism: Mechanism,
    terms: Terms,
    memo: Memo | None = None,
) -> GivenGradients:
    """Gradients of all that a read is given; ``grad_out`` has any strides, memo as there."""
    if terms.gate is None:
        terms = terms._replace(lepe=None)  # a sum has no gradient to compute
    call = remembered(memo, "backward", q, grad_out, mechanism, terms)
    sums = _aligned(state, call)
    powers, shares = _of_powers(q, terms, call.summing.splits)
    state_, norm, mean = (None if x is None else torch.empty_like(x) for x in sums)
    assert state_ is not None
    scale, lepe, gate = terms.head_scale, terms.lepe, terms.gate
    grads = GivenGradients(
        _like(q), state_, norm, mean, None, None if lepe is None else _like(lepe),
        None if gate is None else _like(gate), powers,
    )  # fmt: skip
    if not call.size:
        for x in (state_, norm, mean, powers):
            if x is not None:
                x.zero_()
        return grads if scale is None else grads._replace(head_scale=torch.zeros_like(scale))
    if norm is not None and not call.whole:  # a sum over slices of the values
        grads = grads._replace(norm=torch.zeros_like(norm))
    extras, fixed = Extras.of(terms, call), tuning.is_fixed()
    found = LinearAttentionState(state_, norm, mean)
    parts = _of_splits(call) if call.merging else found
    with on_device(call):
        for part in call.slices:
            given, into = strided(part.of(grad_out)), part.of_sums(*parts[:3])
            epilogue = (strided(part.of(terms.lepe)), strided(part.of(terms.gate)))
            grad_epilogue = (strided(part.of(grads.lepe)), strided(part.of(grads.gate)))
            part.query_of_read.runs[fixed](
                given, strided(q), strided(grads.q), epilogue, grad_epilogue, *extras[:5],
                part.of_sums(*sums), None, into, shares, call.length, extras.width, call.heads,
                call.summing.chunk, call.scale,
            )  # fmt: skip
            if call.merging:
                part.merge(into, part.of_sums(*found[:3]))
            if norm is not None and grads.norm is not None and norm is not grads.norm:
                grads.norm.add_(norm)
            if powers is not None and shares is not None:
                add_share(powers, shares, (0, 1), part)
    if terms.head_scale is not None:
        grads = grads._replace(head_scale=(grads.state * state.state).sum((0, 2, 3)))
        grads.state.mul_(terms.head_scale[:, None, None])
    return grads


def _split(splits: int, x: Tensor) -> Tensor:
    """Memory for what each split leaves of a tensor."""
    return x.new_empty((splits, *x.shape))


def _like(x: Tensor) -> Tensor:
    """Contiguous memory for a tensor like this one."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _of_splits(call: Call) -> LinearAttentionState:
    """Memory for the sums of each split, as launches take it."""
    scratch = call.forward_scratch
    memory: Sequence[Any] = scratch.vectors() if call.whole else scratch.carve()
    _, state, norm, mean, logsumexp = memory
    return LinearAttentionState(state, norm, mean, logsumexp=logsumexp)


def _aligned(state: LinearAttentionState, call: Call) -> Sums:
    """State, normaliser and mean value as kernels take them, as far as the mechanism reads them."""
    sums, norm, mean, *_ = state
    norm = aligned(norm) if norm is not None and call.plan.uses_norm else None
    mean = aligned(mean) if mean is not None and call.plan.uses_mean else None
    return aligned(sums), norm, mean


def _of_powers(x: Tensor, terms: Terms, splits: int) -> tuple[Tensor | None, Tensor | None]:
    """Memory for the gradient of powers, and for the shares of splits and samples."""
    if terms.powers is None:
        return None, None
    batch, _, heads, dim = x.shape
    powers = x.new_empty((heads, dim), dtype=torch.float32)
    return powers, powers.new_empty((splits, batch, heads, dim))
