"""Grids, workspaces and launches: the kernels as functions on tensors.

Both functions take q, k, v and the terms of the epilogue as [B, N, h, D] with any strides. The
scratch memory of a call is splits of a state for each head, merged in their order: as many splits
as fill the device, and for long sequences at most a hundredth of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..mechanisms import Mechanism
from . import backward as backward_kernels
from . import forward as forward_kernels
from . import tuning
from .plan import Plan, make_plan

PROGRAMS_PER_PROCESSOR = 4
SHORTEST_SPLIT = 256  # tokens; below, one program does everything
LONG = 16384  # tokens from which on the workspace is bounded by the inputs
WORKSPACE = 0.01  # of the inputs
CHUNK_MULTIPLE = 128  # the largest block: a split ends where a block does
MERGE_BLOCK = 1024

_INTERPRETER_PROCESSORS = 1

Sums = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Cut:
    """A number of tokens cut into splits.

    Attributes:
        chunk: Tokens of a split, but for the last.
        splits: Their number.
    """

    chunk: int
    splits: int


def cut(length: int, splits: int) -> Cut:
    """Cut into at most so many splits."""
    chunk = -(-length // max(splits, 1))
    chunk = -(-chunk // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    return Cut(chunk, -(-length // chunk))


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return _INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def cuts(
    plan: Plan, slots: int, length: int, itemsize: int, device: torch.device
) -> tuple[Cut, Cut]:
    """How passes are cut: those that leave a state for each split, and those that do not."""
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors(device) // max(slots, 1))
    wide = min(wanted, length // SHORTEST_SPLIT)
    summing = wide
    if length >= LONG:
        inputs = 4 * length * plan.head_dim * itemsize
        state = 4 * (plan.rows * plan.head_dim + plan.features + plan.head_dim)
        # One of the states is the merged one.
        summing = min(summing, int(WORKSPACE * inputs) // state - 1)
    return cut(length, summing), cut(length, wide)


class Call:
    """One call: its plan, its sizes, and the arguments that all of its kernels take."""

    def __init__(
        self,
        q: Tensor,
        rows: Tensor | None,
        cols: Tensor | None,
        mask: Tensor | None,
        head_scale: Tensor | None,
        lepe: Tensor | None,
        gate: Tensor | None,
        mechanism: Mechanism,
    ) -> None:
        self.batch, self.length, self.heads, dim = q.shape
        self.slots = self.batch * self.heads
        self.device, self.dtype = q.device, q.dtype
        self.plan = make_plan(
            mechanism,
            q.dtype,
            dim,
            rotary=rows is not None,
            mask=mask is not None,
            scale=head_scale is not None,
            lepe=lepe is not None,
            gate=gate is not None,
        )
        self.tables: tuple[Tensor, Tensor] | None = None
        self.width = 1
        if rows is not None and cols is not None:
            self.tables = (rows.float().contiguous(), cols.float().contiguous())
            self.width = cols.shape[0]
        self.mask: tuple[Any, ...] | None = None
        self.counts: Tensor | None = None
        if mask is not None:
            self.mask = (mask.view(torch.uint8), *mask.stride())
            self.counts = (~mask).sum(1, dtype=torch.float32)
        self.head_scale = None if head_scale is None else head_scale.contiguous()
        self.scale = dim**-0.5
        itemsize = q.element_size()
        self.summing, self.wide = cuts(self.plan, self.slots, self.length, itemsize, q.device)

    def empty(self, *shape: int) -> Tensor:
        """Fresh float32 memory."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def sums(self, *lead: int) -> Sums:
        """Memory for a state, a normaliser and a mean value for each of ``lead``."""
        plan = self.plan
        return (
            self.empty(*lead, plan.rows, plan.head_dim),
            self.empty(*lead, plan.features) if plan.uses_norm else None,
            self.empty(*lead, plan.head_dim) if plan.uses_mean else None,
        )

    def parts(self) -> Sums:
        """The same for each split."""
        return self.sums(self.summing.splits, self.batch, self.heads)

    def slices(self) -> Iterator[slice]:
        """Slices of the channels of the values, with the plan made for each in turn."""
        whole = self.plan
        for first in range(0, whole.head_dim, whole.value_dim):
            last = min(first + whole.value_dim, whole.head_dim)
            self.plan = replace(whole, value_dim=last - first, adds=first > 0)
            yield slice(first, last)

    def launch(
        self, kernel: Any, splits: int, *args: Any, plan: Plan | None = None, **constants: Any
    ) -> None:
        """Run a kernel for every head of every sample and each split."""
        own = self.plan if plan is None else plan

        def call(config: tuning.Config) -> None:
            plan = replace(own, block_tokens=config.block_tokens)
            kernel[(self.slots, splits)](
                *args,
                plan=plan,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **constants,
            )

        # Powers of eight, not the size itself: another resolution is seldom another key.
        size = (self.slots * self.length).bit_length() // 3
        options = tuple(constants.items())
        key = (kernel.__name__, own, self.dtype, self.device, size, options)
        tuning.run(key, own, call)

    def merge(
        self,
        parts: Sums,
        sums: Sums,
        statistic_parts: Tensor | None = None,
        statistics: Tensor | None = None,
    ) -> None:
        """Merge the slots of all splits; with statistics, as averages under a softmax."""
        tiles = -(-self.plan.rows * self.plan.value_dim // MERGE_BLOCK)
        forward_kernels.merge_kernel[(self.slots, tiles)](
            parts,
            statistic_parts,
            sums,
            statistics,
            self.summing.splits,
            softmax=statistics is not None,
            block=MERGE_BLOCK,
            plan=self.plan,
            num_warps=4,
        )

    def on_device(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device, wherever the tensors are."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def strided(x: Tensor | None) -> tuple[Any, ...] | None:
    """A tensor as the kernels take it."""
    return None if x is None else (x, *x.stride())


def part(x: Tensor | None, channels: slice) -> Tensor | None:
    """A slice of the channels, which stand last."""
    return None if x is None else x[..., channels]


def part_of_sums(sums: Sums, channels: slice) -> Sums:
    """The same of a state, a normaliser and a mean value; the normaliser has no such channels."""
    state, norm, mean = sums
    return part(state, channels), norm, part(mean, channels)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    mask: Tensor | None,
    head_scale: Tensor | None,
    lepe: Tensor | None,
    gate: Tensor | None,
    mechanism: Mechanism,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output [B, N, h, D], contiguous, and state, norm, mean value, mean query and logsumexp.

    Those are as from `torch.ops.vitlinear.linear_attention`: empty where there is none.
    """
    call = Call(q, rows, cols, mask, head_scale, lepe, gate, mechanism)
    plan, lead = call.plan, (call.batch, call.heads)
    one_query, softmax = mechanism.has_global_query, mechanism.has_key_softmax
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sums = call.sums(*lead)
    query = call.empty(*lead, plan.features) if one_query else None
    statistics = call.empty(*lead, *(() if one_query else (plan.features,))) if softmax else None
    if out.numel():
        with call.on_device():
            for channels in call.slices():
                epilogue = (strided(part(lepe, channels)), strided(part(gate, channels)))
                values = (v[..., channels], out[..., channels])
                _forward(call, q, k, *values, epilogue, sums, query, statistics, channels)
    state, norm, mean = sums
    assert state is not None
    none = (call.empty(0) if x is None else x for x in (norm, mean, query, statistics))
    return out, state, *none  # type: ignore[return-value]


def _forward(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    epilogue: tuple[Any, Any],
    sums: Sums,
    query: Tensor | None,
    statistics: Tensor | None,
    channels: slice,
) -> None:
    """Launch the forward kernels for a slice of the values."""
    length, width, heads, scale = call.length, call.width, call.heads, call.scale
    summing, wide = call.summing, call.wide
    options = (call.tables, call.mask, call.counts)
    sums = part_of_sums(sums, channels)
    if wide.splits == 1 and call.plan.fits_one_kernel:
        call.launch(
            forward_kernels.forward_kernel, 1,
            strided(q), strided(k), strided(v), strided(out), epilogue, *options, call.head_scale,
            sums, query, statistics, length, width, heads, wide.chunk, scale,
        )  # fmt: skip
        return

    query_parts = None
    if query is not None:
        query_parts = call.empty(wide.splits, *query.shape)
        call.launch(
            forward_kernels.mean_query_kernel, wide.splits,
            strided(q), *options[1:], query_parts, length, heads, wide.chunk, scale,
        )  # fmt: skip
    merging = summing.splits > 1
    parts, statistic_parts = sums, statistics
    if merging:
        parts = part_of_sums(call.parts(), channels)
        if statistics is not None:
            statistic_parts = call.empty(summing.splits, *statistics.shape)
    call.launch(
        forward_kernels.state_kernel, summing.splits,
        strided(k), strided(v), *options, query_parts, query, parts, statistic_parts,
        length, width, heads, summing.chunk, wide.splits, scale,
    )  # fmt: skip
    if merging:
        call.merge(parts, sums, statistic_parts, statistics)
    call.launch(
        forward_kernels.read_kernel, wide.splits,
        strided(q), strided(out), epilogue, *options, call.head_scale, sums,
        length, width, heads, wide.chunk, scale,
    )  # fmt: skip


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    mask: Tensor | None,
    head_scale: Tensor | None,
    lepe: Tensor | None,
    gate: Tensor | None,
    state: Tensor,
    norm: Tensor,
    mean_v: Tensor,
    query: Tensor,
    logsumexp: Tensor,
    mechanism: Mechanism,
    grads: tuple[Tensor, ...],
    grad_lepe: Tensor | None = None,
) -> Tensor | None:
    """Write the gradients of all that lies like q, and return that of head_scale, [h], or None.

    Args:
        grad_out: Gradient of the output, any strides.
        q: Queries; this and the next eight as in the forward pass.
        k: Keys.
        v: Values.
        rows: Position table of the rows.
        cols: Of the columns.
        mask: Padding mask.
        head_scale: tau.
        lepe: Added to the output.
        gate: Multiplies it.
        state: From the forward pass, as the next four.
        norm: .
        mean_v: .
        query: .
        logsumexp: .
        mechanism: The row of the table.
        grads: Where the gradients of q, k, v and, if there is one, the gate go: [B, N, h, D] with
            any strides, such as the slices of one buffer laid out like the projection that q, k, v
            and the gate are slices of.
        grad_lepe: Where that of lepe goes; None without lepe, and without a gate, for it then is
            the gradient of the output.
    """
    if gate is None:
        lepe = None  # a sum has no gradient to compute
    call = Call(q, rows, cols, mask, head_scale, lepe, gate, mechanism)
    sums = (state, norm if call.plan.uses_norm else None, mean_v if call.plan.uses_mean else None)
    if not q.numel():
        return None if head_scale is None else torch.zeros_like(head_scale)
    grad_q, grad_k, grad_v, *grad_gates = grads
    grad_gate = grad_gates[0] if grad_gates else None
    total: Tensor | None = None
    with call.on_device():
        for channels in call.slices():
            terms = tuple(part(x, channels) for x in (lepe, gate, grad_lepe, grad_gate))
            values = (grad_out[..., channels], q, k, v[..., channels])
            into = (grad_q, grad_k, grad_v[..., channels])
            saved = (part_of_sums(sums, channels), query, logsumexp)
            grad_scale = _backward(call, *values, *into, terms, *saved, channels)
            total = grad_scale if total is None or grad_scale is None else total + grad_scale
    return total


def _backward(
    call: Call,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    terms: tuple[Tensor | None, ...],
    sums: Sums,
    query: Tensor,
    statistics: Tensor,
    channels: slice,
) -> Tensor | None:
    """Launch the backward kernels for a slice of the values."""
    length, width, heads, scale = call.length, call.width, call.heads, call.scale
    summing, wide = call.summing, call.wide
    options = (call.tables, call.mask, call.counts, call.head_scale)
    lepe, gate, grad_lepe, grad_gate = terms
    epilogue = (strided(lepe), strided(gate))
    grad_epilogue = (strided(grad_lepe), strided(grad_gate))
    into_keys = (strided(grad_k), strided(grad_v))
    if wide.splits == 1 and call.plan.fits_one_kernel:
        scales = None if call.head_scale is None else call.empty(call.batch, heads)
        call.launch(
            backward_kernels.backward_kernel, 1,
            strided(grad_out), strided(q), strided(k), strided(v), strided(grad_q), *into_keys,
            epilogue, grad_epilogue, *options, scales, sums, query, statistics,
            length, width, heads, wide.chunk, scale,
        )  # fmt: skip
        return None if scales is None else scales.sum(0)

    one_query, softmax = call.plan.key_weights == "global_query", call.plan.statistics > 0
    grad_sums = part_of_sums(call.sums(call.batch, heads), channels)
    merging = summing.splits > 1
    parts = part_of_sums(call.parts(), channels) if merging else grad_sums
    queries = (strided(q), strided(grad_q), epilogue, grad_epilogue, *options, sums)
    call.launch(
        backward_kernels.query_kernel, summing.splits, strided(grad_out), *queries, None, parts,
        length, width, heads, summing.chunk, 1, scale, with_sums=True, with_grads=not one_query,
    )  # fmt: skip
    if merging:
        call.merge(parts, grad_sums)
    mean_parts = query_parts = None
    if softmax:
        mean_parts = call.empty(wide.splits, call.slots, call.plan.statistics)
        call.launch(
            backward_kernels.key_mean_kernel, wide.splits,
            strided(k), strided(v), *options, query, statistics, grad_sums, mean_parts,
            length, width, heads, wide.chunk, scale,
        )  # fmt: skip
    if one_query:
        query_parts = call.empty(wide.splits, call.slots, call.plan.features)
    call.launch(
        backward_kernels.key_kernel, wide.splits,
        strided(k), strided(v), *into_keys, *options, query, statistics, grad_sums,
        mean_parts, query_parts, length, width, heads, wide.chunk, wide.splits, scale,
    )  # fmt: skip
    if one_query:
        plan = call.plan
        if grad_lepe is not None:  # what the gate and the gradient of the output have made already
            grad_out, plan = grad_lepe, replace(plan, has_lepe=False, has_gate=False)
        call.launch(
            backward_kernels.query_kernel, wide.splits,
            strided(grad_out), *queries, query_parts, parts, length, width, heads, wide.chunk,
            wide.splits, scale, with_sums=False, with_grads=True, plan=plan,
        )  # fmt: skip
    if call.head_scale is None:
        return None
    grad_state, state = grad_sums[0], sums[0]
    assert grad_state is not None and state is not None
    return (grad_state * state).sum((0, 2, 3))
