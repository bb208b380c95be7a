"""Grids, workspaces and launches, which make functions on tensors of the kernels.

Both functions take q, k, v and the terms of the epilogue as [B, N, h, D] with any strides. The
scratch memory of a call is splits of a state for each head, merged in their order: as many splits
as fill the device, and for long sequences at most a hundredth of the inputs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attention_state import LinearAttentionState
from ..backward import LinearGradients
from ..mechanisms import Mechanism
from ..terms import Terms
from . import backward_kernels, forward_kernels, tuning
from .plan import Plan, make_plan

PROGRAMS_PER_PROCESSOR = 4
SHORTEST_SPLIT = 256  # tokens; below, one program does everything
LONG = 16384  # tokens from which on the workspace is bounded by the inputs
WORKSPACE = 0.01  # of the inputs
CHUNK_MULTIPLE = 128  # the largest block: a split ends where a block does
MERGE_BLOCK = 1024

_INTERPRETER_PROCESSORS = 1

# State, normaliser and mean value.
Sums = tuple[Tensor, Tensor | None, Tensor | None]


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
    """The cut of passes that leave a state for each split, and of those that do not."""
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors(device) // max(slots, 1))
    wide = min(wanted, length // SHORTEST_SPLIT)
    summing = wide
    if length >= LONG:
        inputs = 4 * length * plan.head_dim * itemsize
        state = 4 * (plan.rows * plan.head_dim + plan.features + plan.head_dim)
        # One of the states is the merged one.
        summing = min(summing, int(WORKSPACE * inputs) // state - 1)
    return cut(length, summing), cut(length, wide)


class Launcher:
    """One call: its plan, its sizes, and the arguments that all of its kernels take."""

    def __init__(self, q: Tensor, mechanism: Mechanism, terms: Terms) -> None:
        self.batch, self.length, self.heads, dim = q.shape
        self.slots = self.batch * self.heads
        self.device, self.dtype = q.device, q.dtype
        self.plan = make_plan(mechanism, q.dtype, dim, terms)
        self.tables: tuple[Tensor, Tensor] | None = None
        self.width = 1
        if terms.rotary is not None:
            rows, cols = terms.rotary
            self.tables = (rows.float().contiguous(), cols.float().contiguous())
            self.width = cols.shape[0]
        self.mask: tuple[Any, ...] | None = None
        self.counts: Tensor | None = None
        if terms.key_padding_mask is not None:
            padding = terms.key_padding_mask
            self.mask = (padding.view(torch.uint8), *padding.stride())
            self.counts = (~padding).sum(1, dtype=torch.float32)
        self.head_scale = None if terms.head_scale is None else terms.head_scale.contiguous()
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
            self.empty(*lead, 1, plan.features) if plan.uses_norm else None,
            self.empty(*lead, 1, plan.head_dim) if plan.uses_mean else None,
        )

    def parts(self) -> Sums:
        """Memory for as much of each split."""
        return self.sums(self.summing.splits, self.batch, self.heads)

    def launch(self, kernel: Any, plan: Plan, splits: int, *args: Any, **constants: Any) -> None:
        """Run a kernel for every head of every sample and each split."""

        def run(config: tuning.Config) -> None:
            kernel[(self.slots, splits)](
                *args,
                plan=replace(plan, block_tokens=config.block_tokens),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **constants,
            )

        # Powers of eight, not the size itself: another resolution is seldom another key.
        size = (self.slots * self.length).bit_length() // 3
        options = tuple(constants.items())
        key = (kernel.__name__, plan, self.dtype, self.device, size, options)
        tuning.run(key, plan, run)

    def merge(
        self,
        plan: Plan,
        parts: Sums,
        sums: Sums,
        statistic_parts: Tensor | None = None,
        statistics: Tensor | None = None,
    ) -> None:
        """Merge the slots of all splits; with statistics, as averages under a softmax."""
        tiles = -(-plan.rows * plan.value_dim // MERGE_BLOCK)
        forward_kernels.merge_kernel[(self.slots, tiles)](
            parts,
            statistic_parts,
            sums,
            statistics,
            self.summing.splits,
            softmax=statistics is not None,
            block=MERGE_BLOCK,
            plan=plan,
            num_warps=4,
        )

    def on_device(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device, wherever the tensors are."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def strided(x: Tensor | None) -> tuple[Any, ...] | None:
    """A tensor as the kernels take it."""
    return None if x is None else (x, *x.stride())


def part(x: Tensor | None, channels: slice) -> Tensor | None:
    """A slice of the channels, which stand last; None of None."""
    return None if x is None else x[..., channels]


def part_of_sums(sums: Sums, channels: slice) -> Sums:
    """A slice of a state and of a mean value; the normaliser has no channels of values."""
    state, norm, mean = sums
    return state[..., channels], norm, part(mean, channels)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mechanism: Mechanism, terms: Terms
) -> tuple[Tensor, LinearAttentionState]:
    """Output [B, N, h, D], contiguous, and the state, in contiguous float32 tensors."""
    call = Launcher(q, mechanism, terms)
    features, lead = call.plan.features, (call.batch, call.heads, 1)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    query = logsumexp = None
    if mechanism.has_global_query:
        query, logsumexp = call.empty(*lead, features), call.empty(*lead, 1)
    elif mechanism.has_key_softmax:
        logsumexp = call.empty(*lead, features)
    state = LinearAttentionState(*call.sums(call.batch, call.heads), query, logsumexp)
    if out.numel():
        with call.on_device():
            for channels, plan in call.plan.slices():
                _forward(call, plan, channels, q, k, v, terms, out, state)
    return out, state


def _forward(
    call: Launcher,
    plan: Plan,
    channels: slice,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: Terms,
    out: Tensor,
    state: LinearAttentionState,
) -> None:
    """Launch the forward kernels for a slice of the values."""
    length, width, heads, scale = call.length, call.width, call.heads, call.scale
    summing, wide = call.summing, call.wide
    options = (call.tables, call.mask, call.counts)
    values, into = strided(v[..., channels]), strided(out[..., channels])
    epilogue = (strided(part(terms.lepe, channels)), strided(part(terms.gate, channels)))
    query, logsumexp = state.query, state.logsumexp
    sums = part_of_sums((state.state, state.norm, state.mean_v), channels)
    if wide.splits == 1 and plan.fits_one_kernel:
        call.launch(
            forward_kernels.forward_kernel, plan, 1,
            strided(q), strided(k), values, into, epilogue, *options, call.head_scale,
            sums, query, logsumexp, length, width, heads, wide.chunk, scale,
        )  # fmt: skip
        return

    query_parts = None
    if query is not None:
        query_parts = call.empty(wide.splits, *query.shape)
        call.launch(
            forward_kernels.mean_query_kernel, plan, wide.splits,
            strided(q), call.mask, call.counts, query_parts, length, heads, wide.chunk, scale,
        )  # fmt: skip
    merging = summing.splits > 1
    parts, statistic_parts = sums, logsumexp
    if merging:
        parts = part_of_sums(call.parts(), channels)
        if logsumexp is not None:
            statistic_parts = call.empty(summing.splits, *logsumexp.shape)
    call.launch(
        forward_kernels.state_kernel, plan, summing.splits,
        strided(k), values, *options, query_parts, query, parts, statistic_parts,
        length, width, heads, summing.chunk, wide.splits, scale,
    )  # fmt: skip
    if merging:
        call.merge(plan, parts, sums, statistic_parts, logsumexp)
    call.launch(
        forward_kernels.read_kernel, plan, wide.splits,
        strided(q), into, epilogue, *options, call.head_scale, sums,
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
    """
    if terms.gate is None:
        terms = terms._replace(lepe=None)  # a sum has no gradient to compute
    call = Launcher(q, mechanism, terms)
    shares: list[Tensor] = []
    if q.numel():
        with call.on_device():
            for channels, plan in call.plan.slices():
                share = _backward(call, plan, channels, grad_out, q, k, v, terms, state, grads)
                shares += [] if share is None else [share]
    if grads.head_scale is not None:
        grads.head_scale.copy_(sum(shares[1:], shares[0]) if shares else torch.zeros(()))


def _backward(
    call: Launcher,
    plan: Plan,
    channels: slice,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: Terms,
    state: LinearAttentionState,
    grads: LinearGradients,
) -> Tensor | None:
    """Launch the backward kernels for a slice of the values; its share of that of tau, [h]."""
    length, width, heads, scale = call.length, call.width, call.heads, call.scale
    summing, wide = call.summing, call.wide
    options = (call.tables, call.mask, call.counts, call.head_scale)
    grad_out, values = grad_out[..., channels], strided(v[..., channels])
    epilogue = (strided(part(terms.lepe, channels)), strided(part(terms.gate, channels)))
    grad_lepe = part(grads.lepe, channels)
    grad_epilogue = (strided(grad_lepe), strided(part(grads.gate, channels)))
    into_keys = (strided(grads.k), strided(grads.v[..., channels]))
    query, logsumexp = state.query, state.logsumexp
    sums = part_of_sums((state.state, state.norm, state.mean_v), channels)
    if wide.splits == 1 and plan.fits_one_kernel:
        scales = None if call.head_scale is None else call.empty(call.batch, heads)
        call.launch(
            backward_kernels.backward_kernel, plan, 1,
            strided(grad_out), strided(q), strided(k), values, strided(grads.q), *into_keys,
            epilogue, grad_epilogue, *options, scales, sums, query, logsumexp,
            length, width, heads, wide.chunk, scale,
        )  # fmt: skip
        return None if scales is None else scales.sum(0)

    one_query, softmax = plan.key_weights == "global_query", plan.statistics > 0
    grad_sums = part_of_sums(call.sums(call.batch, heads), channels)
    merging = summing.splits > 1
    parts = part_of_sums(call.parts(), channels) if merging else grad_sums
    queries = (strided(q), strided(grads.q), epilogue, grad_epilogue, *options, sums)
    call.launch(
        backward_kernels.query_kernel, plan, summing.splits,
        strided(grad_out), *queries, None, parts,
        length, width, heads, summing.chunk, 1, scale, with_sums=True, with_grads=not one_query,
    )  # fmt: skip
    if merging:
        call.merge(plan, parts, grad_sums)
    mean_parts = query_parts = None
    if softmax:
        mean_parts = call.empty(wide.splits, call.slots, plan.statistics)
        call.launch(
            backward_kernels.key_mean_kernel, plan, wide.splits,
            strided(k), values, *options, query, logsumexp, grad_sums, mean_parts,
            length, width, heads, wide.chunk, scale,
        )  # fmt: skip
    if one_query:
        query_parts = call.empty(wide.splits, call.slots, plan.features)
    call.launch(
        backward_kernels.key_kernel, plan, wide.splits,
        strided(k), values, *into_keys, *options, query, logsumexp, grad_sums,
        mean_parts, query_parts, length, width, heads, wide.chunk, wide.splits, scale,
    )  # fmt: skip
    if one_query:
        if grad_lepe is not None:  # what the gate and the gradient of the output have made already
            grad_out, plan = grad_lepe, replace(plan, has_lepe=False, has_gate=False)
        call.launch(
            backward_kernels.query_kernel, plan, wide.splits,
            strided(grad_out), *queries, query_parts, parts, length, width, heads, wide.chunk,
            wide.splits, scale, with_sums=False, with_grads=True,
        )  # fmt: skip
    if call.head_scale is None:
        return None
    grad_state, *_ = grad_sums
    return (grad_state * sums[0]).sum((0, 2, 3))
