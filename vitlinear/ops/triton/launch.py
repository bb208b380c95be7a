"""Prepared calls, grids, workspaces and launches, which make functions on tensors of the kernels.

Both functions take q, k, v and the terms of the epilogue as [B, N, h, D] with any strides. The
scratch memory of a call is splits of a state for each head, merged in their order: as many splits
as fill the device, and for long sequences at most a hundredth of the inputs or two states for each
processor, 4.5 MB on H100 for D = 64.

Everything that does not depend on the tensors themselves is decided once for a kind of call and
kept (`prepared`): on a GPU the kernels of a small map take less time than Python would otherwise
take to launch them (benchmarks/host_cost.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention_state import LinearAttentionState
from ..backward import LinearGradients
from ..mechanisms import Mechanism
from ..terms import Terms
from . import backward_kernels, forward_kernels, tuning
from .memory import Layout, with_shape
from .plan import Plan, lanes, make_plan

SHORTEST_CUT = 256  # tokens; below, one program does everything
LONG = 16384  # tokens from which on the workspace is bounded by the inputs
WORKSPACE = 0.01  # of the inputs, or
STATES_PER_PROCESSOR = 2  # if that is more: a small batch of long maps must fill the device
CHUNK_MULTIPLE = 32  # the block of the fixed choice: a split ends where a block does
SHORTEST_SPLIT = 16  # tokens: half a block, for a map that would else leave processors idle
MERGE_BLOCK = 256
MOST_PREPARED = 1024  # kinds of call that are kept

_INTERPRETER_PROCESSORS = 1

# State, normaliser and mean value.
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
    if chunk > SHORTEST_SPLIT:
        chunk = -(-chunk // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    else:
        chunk = SHORTEST_SPLIT
    return Cut(chunk, -(-length // chunk))


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return _INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits_that_fill(slots: int, at_once: int) -> int:
    """The least number of splits with which a pass over ``slots`` heads takes the least time.

    Programs run in rounds of ``at_once``, and one program more than a round takes another round.
    Two rounds at most, and one split of each head: more states are more to merge.
    """
    most = (2 * at_once + slots) // slots
    return min(range(1, most + 1), key=lambda splits: -(-slots * splits // at_once) / splits)


def cuts(
    plan: Plan, slots: int, length: int, itemsize: int, device: torch.device
) -> tuple[Cut, Cut]:
    """The cut of passes that leave a state for each split, and of those that do not."""
    wanted = splits_that_fill(max(slots, 1), plan.programs_per_processor * processors(device))
    wide = min(wanted, -(-length // SHORTEST_SPLIT)) if length >= SHORTEST_CUT else 1
    summing = wide
    if length >= LONG:
        inputs = 2 * length * (plan.head_dim + plan.values) * itemsize
        state = 4 * (plan.rows * plan.values + plan.features + plan.values)
        # One of the states is the merged one.
        of_inputs = int(WORKSPACE * inputs) // state - 1
        filling = max(STATES_PER_PROCESSOR * processors(device) // max(slots, 1), 1)
        summing = min(summing, max(of_inputs, filling))
    return cut(length, summing), cut(length, wide)


class Launch:
    """A kernel, its grid, its plan and its constants: a launch but for tensors and sizes.

    Attributes:
        runs: Functions of tensors and sizes, by `tuning.is_fixed`: the kernel with all its options,
            once it has run in the configuration that is chosen.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int],
        plan: Plan,
        kind: tuple[Any, ...],
        **constants: Any,
    ) -> None:
        """Prepare it.

        Args:
            kernel: The kernel.
            grid: Programs.
            plan: Its plan, without what `tuning` decides.
            kind: What else the choice of a configuration may depend on.
            **constants: Compile-time arguments besides the plan.
        """
        self._kernel = kernel
        self._plan = plan
        self._constants = {"grid": grid, "warmup": False, **constants}
        self._key = (kernel.__name__, plan, *kind, tuple(constants.items()))
        self._names = {fixed: tuning.name(self._key, plan, fixed) for fixed in (False, True)}
        self.runs: list[Callable[..., Any]] = [
            partial(self._choose_and_run, fixed) for fixed in (False, True)
        ]

    def __call__(self, fixed: bool, *args: Any) -> None:
        """Run the kernel.

        Args:
            fixed: `tuning.is_fixed`, asked once for all launches of a call.
            *args: Tensors and sizes.
        """
        self.runs[fixed](*args)

    def _choose_and_run(self, fixed: bool, *args: Any) -> None:
        config = tuning.chosen(self._names[fixed])
        if config is None:
            tuning.run(self._key, self._plan, lambda config: self._with(config)(*args))
        else:
            self.runs[fixed] = self._with(config)
            self.runs[fixed](*args)

    def _with(self, config: tuning.Config) -> Callable[..., Any]:
        return partial(
            self._kernel.run,
            plan=replace(self._plan, block_tokens=config.block_tokens),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **self._constants,
        )


class Slice:
    """The launches for a slice of the channels of the values; see `Plan.slices`.

    Attributes:
        channels: The slice; None where it is all of them.
        is_first: Whether no other comes before it.
        one_kernel: Whether a single kernel does everything, forward and backward.
        forward: That kernel, forward.
        backward: Likewise, backward.
        mean_query: Otherwise, in this order: the mean of the queries, if it weighs the keys,
        state: the sums over the keys,
        merge: the merge of the splits' sums,
        read: the outputs;
        query: backward, the pass over the queries,
        key_mean: the mean that the gradient of a softmax subtracts, if there is one,
        key: the pass over the keys,
        query_of_read: the pass over queries that read a state which is given,
        query_again: and the gradients of queries whose mean weighs the keys.
    """

    def __init__(self, call: Call, channels: slice | None, plan: Plan) -> None:
        self.channels = channels
        self.is_first = not plan.adds
        kind = call.kind
        summing, wide = (call.slots, call.summing.splits), (call.slots, call.wide.splits)
        self.one_kernel = call.wide.splits == 1 and plan.fits_one_kernel
        one_query = plan.key_weights == "global_query"
        forward, backward = forward_kernels, backward_kernels
        self.forward = Launch(forward.forward_kernel, wide, plan, kind)
        self.backward = Launch(backward.backward_kernel, wide, plan, kind)
        self.mean_query = Launch(forward.mean_query_kernel, wide, plan, kind)
        self.state = Launch(forward.state_kernel, summing, plan, kind)
        self.read = Launch(forward.read_kernel, wide, plan, kind)
        self.query = Launch(
            backward.query_kernel, summing, plan, kind, with_sums=True, with_grads=not one_query
        )
        self.query_of_read = self.query
        if one_query:
            self.query_of_read = Launch(
                backward.query_kernel, summing, plan, kind, with_sums=True, with_grads=True
            )
        self.key_mean = Launch(backward.key_mean_kernel, wide, plan, kind)
        self.key = Launch(backward.key_kernel, wide, plan, kind)
        again = plan
        if plan.has_lepe and plan.has_gate:  # their pass has left the gradient of the sum
            again = replace(plan, has_lepe=False, has_gate=False)
        self.query_again = Launch(
            backward.query_kernel, wide, again, kind, with_sums=False, with_grads=True
        )
        tiles = -(-plan.rows * plan.value_dim // MERGE_BLOCK)
        # Takes the sums of splits, their statistics, memory for both, and whether it is a softmax.
        self.merge_of: dict[bool, Callable[..., Any]] = {
            softmax: partial(
                forward_kernels.merge_kernel.run, splits=call.summing.splits, softmax=softmax,
                grid=(call.slots, tiles), warmup=False, block=MERGE_BLOCK, plan=plan, num_warps=4,
            )
            for softmax in (False, True)
        }  # fmt: skip
        self._wide_splits = call.wide.splits
        self._sum_options = {"grid": (call.slots, 1), "warmup": False, "num_warps": 4}

    def sum(self, parts: Tensor | None, total: Tensor | None, entries: int) -> None:
        """Sum vectors of so many entries over the splits of a pass that leaves no states."""
        forward_kernels.sum_kernel.run(
            parts, total, self._wide_splits, size=entries, block=lanes(entries),
            **self._sum_options,
        )  # fmt: skip

    def merge(
        self,
        parts: Sums,
        sums: Sums,
        statistic_parts: Tensor | None = None,
        statistics: Tensor | None = None,
    ) -> None:
        """Merge the slots of all splits; with statistics, as averages under a softmax."""
        self.merge_of[statistics is not None](parts, statistic_parts, sums, statistics)

    def of(self, x: Tensor | None) -> Tensor | None:
        """The channels of values that the slice has of a tensor; None of None."""
        return x if x is None or self.channels is None else x[..., self.channels]

    def of_sums(self, state: Tensor | None, norm: Tensor | None, mean: Tensor | None) -> Sums:
        """Likewise of a state and of a mean value; the normaliser has no channels of values."""
        return self.of(state), norm, self.of(mean)


class Call:
    """A kind of call: its sizes, its plan, its launches, and how its memory is laid out.

    Attributes:
        device: Where it runs.
        cuda: The number of that device, if it is a GPU.
        whole: Whether there is but one slice.
        summing: The cut of passes that leave a state for each split.
        wide: The cut of those that do not.
        slices: The launches.
        kept: Memory of what forward leaves for backward, in the order of `LinearAttentionState`.
        forward_scratch: Memory of the splits' mean queries, state, normaliser, mean value and
            logsumexp.
        backward_scratch: Memory of the gradients of state, normaliser and mean value; the same of
            each split; of each split's means under a softmax, and of its gradients of the mean
            query; of their sums; of each sample's gradients of tau; of each split's gradients of
            powers.
        scales: Shape of the gradients of tau in it, [B, h]; None if there are none.
        powers: Shape of the gradients of powers in it, [splits, B, h, D]; None if there are none.
        powers_of_queries: The splits among them that are of the pass over queries; the others, of
            the pass over keys, follow.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        plan: Plan,
    ) -> None:
        self.batch, self.length, self.heads, dim = shape
        self.slots = self.batch * self.heads
        self.scale = dim**-0.5
        self.device = device
        self.cuda = device.index if device.type == "cuda" else None
        self.plan = plan
        self.summing, self.wide = cuts(plan, self.slots, self.length, dtype.itemsize, device)
        # Powers of eight, not the size itself: another resolution is seldom another key.
        self.kind = (dtype, device, (self.slots * self.length).bit_length() // 3)
        self.merging = self.summing.splits > 1
        self.whole = plan.value_dim == plan.values
        self.slices = [
            Slice(self, None if self.whole else channels, part) for channels, part in plan.slices()
        ]
        self._lay_out(mechanism)

    def _lay_out(self, mechanism: Mechanism) -> None:
        plan, slots = self.plan, (self.batch, self.heads)
        state = (
            (plan.rows, plan.values),
            (1, plan.features) if plan.uses_norm else None,
            (1, plan.values) if plan.uses_mean else None,
        )
        query = (1, plan.features) if mechanism.has_global_query else None
        logsumexp = (1, plan.statistics) if plan.statistics else None

        def of_each(*lead: int, shapes: tuple[tuple[int, ...] | None, ...]) -> list[Any]:
            return [None if shape is None else (*lead, *slots, *shape) for shape in shapes]

        self.kept = Layout(of_each(shapes=(*state, query, logsumexp)), self.device)
        summing, wide = self.summing.splits, self.wide.splits
        one_kernel = self.slices[0].one_kernel
        parts = state if self.merging and not one_kernel else (None, None, None)
        self.forward_scratch = Layout(
            [
                *of_each(wide, shapes=(None if one_kernel or wide == 1 else query,)),
                *of_each(summing, shapes=parts),
                *of_each(summing, shapes=(logsumexp if self.merging else None,)),
            ],
            self.device,
        )
        self.scales = slots if one_kernel and plan.has_scale else None
        self.powers_of_queries = 0
        self.powers: tuple[int, ...] | None = None
        if plan.has_powers:
            # Of the splits of the pass over queries, and of that over keys.
            self.powers_of_queries = 1 if one_kernel else wide if query else summing
            number = self.powers_of_queries + (0 if one_kernel else wide)
            self.powers = (number, *slots, plan.head_dim)
        if one_kernel:
            self.backward_scratch = Layout([*[None] * 10, self.scales, self.powers], self.device)
            return
        self.backward_scratch = Layout(
            [
                *of_each(shapes=state),
                *of_each(summing, shapes=parts),
                *of_each(wide, shapes=(logsumexp, query) if wide > 1 else (None, None)),
                *of_each(shapes=(logsumexp, query)),
                self.scales,
                self.powers,
            ],
            self.device,
        )


_prepared: dict[tuple[Any, ...], Call] = {}


def prepared(q: Tensor, v: Tensor, mechanism: Mechanism, terms: Terms) -> Call:
    """The prepared call of this kind, made when it is the first."""
    # `make_plan` looks at the setting of products in float32.
    precision = torch.get_float32_matmul_precision() if q.dtype == torch.float32 else None
    given = tuple([x is not None for x in terms])
    # Of the width of the tables it depends whether they turn the heads side by side.
    angles = None if terms.rotary is None else terms.rotary.rows.shape[1]
    key = (mechanism.name, q.shape, v.shape[-1], q.dtype, q.device, given, angles, precision)
    call = _prepared.get(key)
    if call is None:
        if len(_prepared) >= MOST_PREPARED:  # sizes that never come again
            _prepared.clear()
        plan = make_plan(mechanism, q.dtype, q.shape[-1], terms, v.shape[-1])
        call = _prepared[key] = Call(mechanism, q.shape, q.dtype, q.device, plan)
    return call


# What one kind of plain call has prepared, forward and backward, in the dictionary that it is from.
Memo = dict[str, tuple[dict[tuple[Any, ...], Call], Call]]


def _remembered(
    memo: Memo | None, step: str, q: Tensor, v: Tensor, mechanism: Mechanism, terms: Terms
) -> Call:
    """As `prepared`, without looking closely at calls that have a memo."""
    if memo is None:
        return prepared(q, v, mechanism, terms)
    found = memo.get(step)
    if found is None or found[0] is not _prepared:
        found = memo[step] = _prepared, prepared(q, v, mechanism, terms)
    return found[1]


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
    def of(cls, terms: Terms) -> Extras:
        """Those of a call."""
        rotary, padding, tau, _, _, powers = terms
        tables = mask = counts = None
        width = 1
        if rotary is not None:
            rows, cols = rotary
            if rows.dtype is not torch.float32 or cols.dtype is not torch.float32:
                rows, cols = rows.float(), cols.float()
            if rows.data_ptr() % 16 or not rows.is_contiguous():
                rows = aligned(rows)
            if cols.data_ptr() % 16 or not cols.is_contiguous():
                cols = aligned(cols)
            tables, width = (rows, cols, 2 * rows.shape[1]), cols.shape[0]
        if padding is not None:
            mask = (padding.view(torch.uint8), *padding.stride())
            counts = (~padding).sum(1, dtype=torch.float32)
        powers = None if powers is None else powers.contiguous()
        tau = None if tau is None else tau.contiguous()
        return cls(tables, mask, counts, powers, tau, width)


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
    call = _remembered(memo, "forward", q, v, mechanism, terms)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    kept: Sequence[Any]
    if vectors and call.whole:
        kept = call.kept.vectors()
    else:
        kept = call.kept.separate() if separate else call.kept.carve()
    state = tuple.__new__(LinearAttentionState, kept)  # as its own `_make`, in half the time
    if out.numel():
        extras, fixed = Extras.of(terms), tuning.is_fixed()
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
    _, _, _, lepe, gate, _ = terms
    state_at, norm, mean, query, logsumexp = state
    sums: Sums = (state_at, norm, mean)
    if part.channels is not None:
        v, out, lepe, gate = (part.of(x) for x in (v, out, lepe, gate))  # type: ignore[assignment]
        sums = part.of_sums(*sums)
    queries, keys, values = (q, *q.stride()), (k, *k.stride()), (v, *v.stride())
    into = (out, *out.stride())
    epilogue = (
        None if lepe is None else (lepe, *lepe.stride()),
        None if gate is None else (gate, *gate.stride()),
    )
    if part.one_kernel:
        part.forward.runs[fixed](
            queries, keys, values, into, epilogue, tables, mask, counts, powers, head_scale,
            sums, query, logsumexp, length, width, heads, call.wide.chunk, scale,
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
            part.sum(query_parts, query, call.plan.features)
    part.state.runs[fixed](
        keys, values, tables, mask, counts, powers, query, parts, statistic_parts,
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
    call = _remembered(memo, "backward", q, v, mechanism, terms)
    if not q.numel():
        for x in (grads.head_scale, grads.powers):
            if x is not None:
                x.zero_()
        return
    extras, fixed, into = Extras.of(terms), tuning.is_fixed(), grads
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
    _, _, _, lepe, gate, _ = terms
    grad_q, grad_k, grad_v, _, grad_lepe, grad_gate, _ = grads
    state_at, norm, mean, query, logsumexp = state
    sums: Sums = (state_at, norm, mean)
    if part.channels is not None:
        some = (grad_out, v, lepe, gate, grad_v, grad_lepe, grad_gate)
        grad_out, v, lepe, gate, grad_v, grad_lepe, grad_gate = map(part.of, some)  # type: ignore[assignment]
        sums = part.of_sums(*sums)
    given, queries = (grad_out, *grad_out.stride()), (q, *q.stride())
    keys, values = (k, *k.stride()), (v, *v.stride())
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
            given, queries, keys, values, into_queries, *into_keys,
            epilogue, grad_epilogue, *options, scales, of_queries, sums, query, logsumexp,
            length, width, heads, call.wide.chunk, scale,
        )  # fmt: skip
        if scales is not None:
            assert call.scales is not None
            _add_share(grads.head_scale, with_shape(scales, call.scales), (0,), part)
        if power_parts is not None:
            _add_share(grads.powers, power_parts, (0, 1), part)
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
            part.sum(mean_parts, key_mean, call.plan.statistics)
    part.key.runs[fixed](
        keys, values, *into_keys, *options, query, logsumexp, grad_sums,
        key_mean, grad_query if query_parts is None else query_parts, of_keys,
        length, width, heads, wide.chunk, scale,
    )  # fmt: skip
    if query_parts is not None:
        part.sum(query_parts, grad_query, call.plan.features)
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
        _add_share(grads.head_scale, of_grad * of_state, (0, 2, 3), part)
    if power_parts is not None:
        _add_share(grads.powers, power_parts, (0, 1), part)


def _add_share(into: Tensor | None, parts: Tensor, axes: tuple[int, ...], part: Slice) -> None:
    """Sum a slice's parts of a gradient of all channels of values; the first slice begins it."""
    if into is None:
        return
    if part.is_first and into.dtype == parts.dtype:
        torch.sum(parts, axes, out=into)
    elif part.is_first:
        into.copy_(parts.sum(axes))
    else:
        into.add_(parts.sum(axes))
