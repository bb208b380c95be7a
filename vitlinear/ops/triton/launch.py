"""Launches of a prepared call, which make functions on tensors of the kernels.

Both functions take q, k, v and the terms of the epilogue as [B, N, h, D] with any strides.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention_state import LinearAttentionState
from ..backward import LinearGradients
from ..mechanisms import Mechanism
from ..terms import Terms
from . import tuning
from .calls import Call, Memo, Slice, Sums, prepared, remembered
from .memory import with_shape


class Extras(NamedTuple):
    """Terms besides the epilogue as kernels take them, and the width of the grid.

    Behind the position tables stands how many numbers a position has in one of them, for heads that
    stand side by side.
    """

    tables: tuple[Tensor, Tensor, int] | None
    mask: tuple[Any, ...] | None
    counts: Tensor | None
    powers: Tensor | None
    head_scale: Tensor | None
    width: int

    @classmethod
    def of(cls, terms: Terms, call: Call) -> Extras:
        """Those of a call."""
        rotary, padding, tau, _, _, powers, _ = terms
        tables = mask = counts = None
        width = 1
        if rotary is not None:
            rows, cols = rotary
            seen = call.tables
            if seen is None or seen[0]() is not rows or seen[1]() is not cols:
                tables, width = _tables(rows, cols, call.table_dtype)
                if tables[0] is rows and tables[1] is cols:  # not copies, of what may change
                    # Not kept alive: they may lie in the memory of a graph.
                    call.tables = weakref.ref(rows), weakref.ref(cols), tables[2], width
            else:
                _, _, entries, width = seen
                tables = rows, cols, entries
        if padding is not None:
            mask = (padding.view(torch.uint8), *padding.stride())
            counts = (~padding).sum(1, dtype=torch.float32)
        powers = None if powers is None else powers.contiguous()
        tau = None if tau is None else tau.contiguous()
        # As its constructor, in half the time.
        return tuple.__new__(cls, (tables, mask, counts, powers, tau, width))


def _tables(
    rows: Tensor, cols: Tensor, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, int], int]:
    """Position tables as kernels take them, and the width of the grid."""
    rows, cols = aligned(rows.to(dtype)), aligned(cols.to(dtype))
    return (rows, cols, 2 * rows.shape[1]), cols.shape[0]


def aligned(x: Tensor) -> Tensor:
    """x in contiguous memory that begins at a multiple of 16 bytes, as all of PyTorch's does."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


_here = nullcontext()


def on_device(call: Call) -> AbstractContextManager[Any]:
    """Triton launches on the current device, wherever the tensors are."""
    if call.cuda is None or call.cuda == torch.cuda.current_device():
        return _here
    return torch.cuda.device(call.cuda)


def strided(x: Tensor | None) -> tuple[Any, ...] | None:
    """A tensor as the kernels take it."""
    return None if x is None else (x, *x.stride())


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: Mechanism,
    terms: Terms,
    separate: bool = False,
    vectors: bool = False,
    memo: Memo | None = None,
) -> tuple[Tensor, LinearAttentionState]:
    """The forward kernels.

    Args:
        q: Queries, [B, N, h, D], any strides.
        k: Keys, likewise.
        v: Values, likewise.
        mechanism: The row of the table.
        terms: All that the attention is given besides.
        separate: Give each tensor of the state memory of its own, as a registered operator needs
            them.
        vectors: Tensors of the state may be vectors, which `backward` takes as well; `with_shapes`
            makes tensors of them.
        memo: Of calls like this one, of `backward` too; empty at first.

    Returns:
        Output [B, N, h, D], contiguous, and the state, in contiguous float32 tensors.
    """
    call = remembered(memo, "forward", q, v, mechanism, terms)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    kept: Sequence[Any]
    if vectors and call.whole:
        kept = call.kept.vectors()
    else:
        kept = call.kept.separate() if separate else call.kept.carve()
    state = tuple.__new__(LinearAttentionState, kept)  # as its own `_make`, in half the time
    if call.size:
        extras, fixed = Extras.of(terms, call), tuning.is_fixed()
        with on_device(call):
            for part in call.slices:
                _forward(call, part, fixed, q, k, v, terms, extras, out, state)
    return out, state


def with_shapes(
    state: LinearAttentionState, q: Tensor, v: Tensor, mechanism: Mechanism, terms: Terms
) -> LinearAttentionState:
    """The state of `forward`, whose tensors have their shapes; arguments as there."""
    if state.state.dim() > 1:
        return state
    kept: list[Any] = prepared(q, v, mechanism, terms).kept.shaped(state)
    return LinearAttentionState(*kept)


def _forward(
    call: Call,
    part: Slice,
    fixed: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: Terms,
    extras: Extras,
    out: Tensor,
    state: LinearAttentionState,
) -> None:
    """Launch the forward kernels for a slice of the values."""
    tables, mask, counts, powers, head_scale, width = extras
    length, heads, scale = call.length, call.heads, call.scale
    _, _, _, lepe, gate, _, weights = terms
    state_at, norm, mean, query, logsumexp = state
    sums: Sums = (state_at, norm, mean)
    if part.channels is not None:
        v, out, lepe, gate = (part.of(x) for x in (v, out, lepe, gate))  # type: ignore[assignment]
        sums = part.of_sums(*sums)
    queries, keys, values = (q, *q.stride()), (k, *k.stride()), (v, *v.stride())
    into = (out, *call.out_stride)
    given = None if weights is None else (weights, *weights.stride())
    epilogue = (
        None if lepe is None else (lepe, *lepe.stride()),
        None if gate is None else (gate, *gate.stride()),
    )
    if part.one_kernel:
        part.forward.runs[fixed](
            queries, keys, values, given, into, epilogue, tables, mask, counts, powers, head_scale,
            sums, query, logsumexp, length, width, heads, call.slots, scale,
        )  # fmt: skip
        return

    wide, summing = call.wide, call.summing
    query_parts, parts, statistic_parts = None, sums, logsumexp
    if call.forward_scratch.size:
        scratch = call.forward_scratch
        query_parts, *some, statistics = scratch.vectors() if call.whole else scratch.carve()
        if call.merging:
            parts, statistic_parts = tuple(some), statistics  # type: ignore[assignment]
            if part.channels is not None:
                parts = part.of_sums(*parts)
    if query is not None:
        into_query = query if query_parts is None else query_parts
        part.mean_query.runs[fixed](
            queries, mask, counts, powers, into_query, length, heads, wide.chunk, scale
        )
        if query_parts is not None:
            part.sum_features(query_parts, query)
    part.state.runs[fixed](
        keys, values, given, tables, mask, counts, powers, query, parts, statistic_parts,
        length, width, heads, summing.chunk, scale,
    )  # fmt: skip
    if call.merging:
        part.merge_of[logsumexp is not None](parts, statistic_parts, sums, logsumexp)
    part.read.runs[fixed](
            queries, into, epilogue, tables, mask, counts, powers, head_scale, sums,
        length, width, heads, wide.chunk, scale,
    )  # fmt: skip


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: Mechanism,
    terms: Terms,
    state: LinearAttentionState,
    grads: LinearGradients,
    memo: Memo | None = None,
) -> None:
    """Write the gradients of a linear attention.

    Args:
        grad_out: Gradient of the output, [B, N, h, D], any strides.
        q: Queries, as in the forward pass.
        k: Keys, as in the forward pass.
        v: Values, as in the forward pass.
        mechanism: The row of the table.
        terms: As in the forward pass.
        state: From the forward pass.
        grads: Memory that is written to: [B, N, h, D] with any strides, such as the slices of one
            buffer laid out like the projection that q, k, v and the gate are slices of, and [h] for
            that of head_scale. None for what there is no gradient of; for lepe without a gate too.
        memo: As in the forward pass.
    """
    if terms.gate is None:
        terms = terms._replace(lepe=None)  # a sum has no gradient to compute
    call = remembered(memo, "backward", q, v, mechanism, terms)
    if not call.size:
        for x in (grads.head_scale, grads.powers):
            if x is not None:
                x.zero_()
        return
    extras, fixed, into = Extras.of(terms, call), tuning.is_fixed(), grads
    if not call.whole:  # sums over the slices, rounded once
        scale, powers = (
            None if x is None else x.new_empty(x.shape, dtype=torch.float32)
            for x in (grads.head_scale, grads.powers)
        )
        into = grads._replace(head_scale=scale, powers=powers)
    with on_device(call):
        for part in call.slices:
            _backward(call, part, fixed, grad_out, q, k, v, terms, extras, state, into)
    if into is not grads:
        for x, total in ((grads.head_scale, into.head_scale), (grads.powers, into.powers)):
            if x is not None and total is not None:
                x.copy_(total)


def _backward(
    call: Call,
    part: Slice,
    fixed: bool,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: Terms,
    extras: Extras,
    state: LinearAttentionState,
    grads: LinearGradients,
) -> None:
    """Launch the backward kernels for a slice of the values."""
    tables, mask, counts, powers, head_scale, width = extras
    length, heads, scale = call.length, call.heads, call.scale
    options = (tables, mask, counts, powers, head_scale)
    _, _, _, lepe, gate, _, weights = terms
    grad_q, grad_k, grad_v, _, grad_lepe, grad_gate, _, grad_weights = grads
    state_at, norm, mean, query, logsumexp = state
    sums: Sums = (state_at, norm, mean)
    if part.channels is not None:
        some = (grad_out, v, lepe, gate, grad_v, grad_lepe, grad_gate)
        grad_out, v, lepe, gate, grad_v, grad_lepe, grad_gate = map(part.of, some)  # type: ignore[assignment]
        sums = part.of_sums(*sums)
    given, queries = (grad_out, *grad_out.stride()), (q, *q.stride())
    keys, values = (k, *k.stride()), (v, *v.stride())
    weighing = None
    if weights is not None and grad_weights is not None:
        weighing = (weights, *weights.stride()), (grad_weights, *grad_weights.stride())
    into_queries = (grad_q, *grad_q.stride())
    into_keys = ((grad_k, *grad_k.stride()), (grad_v, *grad_v.stride()))
    epilogue = (
        None if lepe is None else (lepe, *lepe.stride()),
        None if gate is None else (gate, *gate.stride()),
    )
    grad_epilogue = (
        None if grad_lepe is None else (grad_lepe, *grad_lepe.stride()),
        None if grad_gate is None else (grad_gate, *grad_gate.stride()),
    )
    parts_of: Sequence[Any] = (None,) * 12
    if call.backward_scratch.size:
        scratch = call.backward_scratch
        parts_of = scratch.vectors() if call.whole else scratch.carve()
    *some_sums, mean_parts, query_parts, key_mean, grad_query, scales, power_parts = parts_of
    of_queries = of_keys = None
    if power_parts is not None:
        assert call.powers is not None
        power_parts = with_shape(power_parts, call.powers)
        of_queries = power_parts
        of_keys = power_parts[call.powers_of_queries :]
    if part.one_kernel:
        part.backward.runs[fixed](
            given, queries, keys, values, weighing, into_queries, *into_keys,
            epilogue, grad_epilogue, *options, scales, of_queries, sums, query, logsumexp,
            length, width, heads, call.slots, scale,
        )  # fmt: skip
        if scales is not None:
            assert call.scales is not None
            add_share(grads.head_scale, with_shape(scales, call.scales), (0,), part)
        if power_parts is not None:
            add_share(grads.powers, power_parts, (0, 1), part)
        return

    wide, summing = call.wide, call.summing
    grad_sums: Sums
    parts: Sums
    grad_sums, parts = tuple(some_sums[:3]), tuple(some_sums[3:])  # type: ignore[assignment]
    if part.channels is not None:
        grad_sums, parts = part.of_sums(*grad_sums), part.of_sums(*parts)
    if not call.merging:
        parts = grad_sums
    reading = (queries, into_queries, epilogue, grad_epilogue, *options, sums)
    part.query.runs[fixed](
        given, *reading, None, parts, None if query is not None else of_queries,
        length, width, heads, summing.chunk, scale,
    )  # fmt: skip
    if call.merging:
        part.merge_of[False](parts, None, grad_sums, None)
    if logsumexp is not None:
        part.key_mean.runs[fixed](
            keys, values, *options, query, logsumexp, grad_sums,
            key_mean if mean_parts is None else mean_parts,
            length, width, heads, wide.chunk, scale,
        )  # fmt: skip
        if mean_parts is not None:
            part.sum_statistics(mean_parts, key_mean)
    part.key.runs[fixed](
        keys, values, weighing, *into_keys, *options, query, logsumexp, grad_sums,
        key_mean, grad_query if query_parts is None else query_parts, of_keys,
        length, width, heads, wide.chunk, scale,
    )  # fmt: skip
    if query_parts is not None:
        part.sum_features(query_parts, grad_query)
    if query is not None:  # what the gate and the gradient of the output have made already
        part.query_again.runs[fixed](
            grad_epilogue[0] or given, *reading, grad_query, parts,
            of_queries, length, width, heads, wide.chunk, scale,
        )  # fmt: skip
    if head_scale is not None:
        # The state is [B, h, rows, channels of the slice]; either may be a vector, which may be
        # longer.
        assert sums[0] is not None and grad_sums[0] is not None
        shape = (call.batch, heads, call.plan.rows, call.plan.values)
        of_state, of_grad = (
            with_shape(x, shape) if x.dim() == 1 else x for x in (sums[0], grad_sums[0])
        )
        add_share(grads.head_scale, of_grad * of_state, (0, 2, 3), part)
    if power_parts is not None:
        add_share(grads.powers, power_parts, (0, 1), part)


def add_share(into: Tensor | None, parts: Tensor, axes: tuple[int, ...], part: Slice) -> None:
    """Sum a slice's parts of a gradient of all channels of values; the first slice begins it."""
    if into is None:
        return
    if part.is_first and into.dtype == parts.dtype:
        torch.sum(parts, axes, out=into)
    elif part.is_first:
        into.copy_(parts.sum(axes))
    else:
        into.add_(parts.sum(axes))
