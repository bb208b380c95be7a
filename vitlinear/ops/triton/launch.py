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

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention_state import LinearAttentionState
from ..backward import LinearGradients
from ..mechanisms import Mechanism
from ..terms import Terms
from . import backward_kernels, forward_kernels, tuning
from .memory import Layout
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
    """A kernel, its grid, its plan and its constants: a launch but for tensors and sizes."""

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
        self._options: dict[tuning.Config, dict[str, Any]] = {}

    def __call__(self, fixed: bool, *args: Any) -> None:
        """Run the kernel.

        Args:
            fixed: `tuning.is_fixed`, asked once for all launches of a call.
            *args: Tensors and sizes.
        """
        config = tuning.chosen(self._names[fixed])
        if config is None:
            tuning.run(self._key, self._plan, lambda config: self._run(config, args))
        else:
            self._run(config, args)

    def _run(self, config: tuning.Config, args: tuple[Any, ...]) -> None:
        options = self._options.get(config)
        if options is None:
            options = self._options[config] = {
                "plan": replace(self._plan, block_tokens=config.block_tokens),
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
                **self._constants,
            }
        self._kernel.run(*args, **options)


class Slice:
    """The launches for a slice of the channels of the values; see `Plan.slices`.

    Attributes:
        channels: The slice; None where it is all of them.
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
        self._merge_options = {
            "grid": (call.slots, tiles), "warmup": False,
            "block": MERGE_BLOCK, "plan": plan, "num_warps": 4,
        }  # fmt: skip
        self._splits, self._wide_splits = call.summing.splits, call.wide.splits
        self._sum_options = {"grid": (call.slots, 1), "warmup": False, "num_warps": 4}

    def sum(self, parts: Tensor, total: Tensor, entries: int) -> None:
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
        forward_kernels.merge_kernel.run(
            parts, statistic_parts, sums, statistics, self._splits,
            softmax=statistics is not None, **self._merge_options,
        )  # fmt: skip

    def of(self, x: Tensor | None) -> Tensor | None:
        """The channels of values that the slice has of a tensor; None of None."""
        return x if x is None or self.channels is None else x[..., self.channels]

    def of_sums(self, state: Tensor | None, norm: Tensor | None, mean: Tensor | None) -> Sums:
        """Likewise of a state and of a mean value; the normaliser has no channels of values."""
        return self.of(state), norm, self.of(mean)


class Call:
    """A kind of call: its sizes, its plan, its launches, and how its memory is laid out.

    Attributes:
        whole: Whether there is but one slice.
        summing: The cut of passes that leave a state for each split.
        wide: The cut of those that do not.
        slices: The launches.
        kept: Memory of what forward leaves for backward, in the order of `LinearAttentionState`.
        forward_scratch: Memory of the splits' mean queries, state, normaliser, mean value and
            logsumexp.
        backward_scratch: Memory of the gradients of state, normaliser and mean value; the same of
            each split; of each split's means under a softmax, and of its gradients of the mean
            query; of their sums; of each sample's gradients of tau; of the gradients of powers, of
            each split of the queries and of the keys.
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

        self.kept = Layout(of_each(shapes=(*state, query, logsumexp)))
        summing, wide = self.summing.splits, self.wide.splits
        one_kernel = self.slices[0].one_kernel
        parts = state if self.merging and not one_kernel else (None, None, None)
        self.forward_scratch = Layout(
            [
                *of_each(wide, shapes=(None if one_kernel or wide == 1 else query,)),
                *of_each(summing, shapes=parts),
                *of_each(summing, shapes=(logsumexp if self.merging else None,)),
            ],
            flat=self.whole,
        )
        scales = slots if one_kernel and plan.has_scale else None
        powers = (plan.head_dim,) if plan.has_powers else None
        if one_kernel:
            of_powers = of_each(1, shapes=(powers,))
            self.backward_scratch = Layout([*[None] * 10, scales, *of_powers, None])
            return
        self.backward_scratch = Layout(
            [
                *of_each(shapes=state),
                *of_each(summing, shapes=parts),
                *of_each(wide, shapes=(logsumexp, query) if wide > 1 else (None, None)),
                *of_each(shapes=(logsumexp, query)),
                scales,
                *of_each(wide if query else summing, shapes=(powers,)),
                *of_each(wide, shapes=(powers,)),
            ],
            flat=self.whole and not plan.has_scale and not plan.has_powers,
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
        tables, width = None, 1
        if terms.rotary is not None:
            rows, cols = terms.rotary
            tables = (aligned(rows.float()), aligned(cols.float()), 2 * rows.shape[1])
            width = cols.shape[0]
        mask = counts = None
        padding = terms.key_padding_mask
        if padding is not None:
            mask = (padding.view(torch.uint8), *padding.stride())
            counts = (~padding).sum(1, dtype=torch.float32)
        tau, powers = (
            None if x is None else x.contiguous() for x in (terms.head_scale, terms.powers)
        )
        return cls(tables, mask, counts, powers, tau, width)


class Shares(NamedTuple):
    """A slice's shares of the gradients that are sums over all channels of the values.

    Attributes:
        head_scale: Of tau, [h]; None without one.
        powers: [h, D]; None without them.
    """

    head_scale: Tensor | None = None
    powers: Tensor | None = None


def aligned(x: Tensor) -> Tensor:
    """x in contiguous memory that begins at a multiple of 16 bytes, as all of PyTorch's does."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, wherever the tensors are."""
    device = x.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


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

    Returns:
        Output [B, N, h, D], contiguous, and the state, in contiguous float32 tensors.
    """
    call = prepared(q, v, mechanism, terms)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    kept: list[Any] = call.kept.separate(q) if separate else call.kept.carve(q)
    state = LinearAttentionState(*kept)
    if out.numel():
        extras, fixed = Extras.of(terms), tuning.is_fixed()
        with on_device(q):
            for part in call.slices:
                _forward(call, part, fixed, q, k, v, terms, extras, out, state)
    return out, state


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
    queries, keys, values, into = (
        strided(q), strided(k), strided(part.of(v)), strided(part.of(out)),
    )  # fmt: skip
    epilogue = (strided(part.of(terms.lepe)), strided(part.of(terms.gate)))
    state_at, norm, mean, query, logsumexp = state
    sums = part.of_sums(state_at, norm, mean)
    if part.one_kernel:
        part.forward(
            fixed, queries, keys, values, into, epilogue, tables, mask, counts, powers, head_scale,
            sums, query, logsumexp, length, width, heads, call.wide.chunk, scale,
        )  # fmt: skip
        return

    wide, summing = call.wide, call.summing
    query_parts, parts, statistic_parts = None, sums, logsumexp
    if call.forward_scratch.size:
        query_parts, *some, statistics = call.forward_scratch.carve(q)
        if call.merging:
            parts, statistic_parts = part.of_sums(*some), statistics
    if query is not None:
        into_query = query if query_parts is None else query_parts
        part.mean_query(
            fixed, queries, mask, counts, powers, into_query, length, heads, wide.chunk, scale
        )
        if query_parts is not None:
            part.sum(query_parts, query, call.plan.features)
    part.state(
        fixed, keys, values, tables, mask, counts, powers, query, parts, statistic_parts,
        length, width, heads, summing.chunk, scale,
    )  # fmt: skip
    if call.merging:
        part.merge(parts, sums, statistic_parts, logsumexp)
    part.read(
        fixed, queries, into, epilogue, tables, mask, counts, powers, head_scale, sums,
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
    call = prepared(q, v, mechanism, terms)
    shares: list[Shares] = []
    if q.numel():
        extras, fixed = Extras.of(terms), tuning.is_fixed()
        with on_device(q):
            for part in call.slices:
                share = _backward(call, part, fixed, grad_out, q, k, v, terms, extras, state, grads)
                shares.append(share)
    for into, name in ((grads.head_scale, "head_scale"), (grads.powers, "powers")):
        if into is not None:
            found = [getattr(share, name) for share in shares]
            into.copy_(sum(found[1:], found[0]) if found else torch.zeros(()))


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
) -> Shares:
    """Launch the backward kernels for a slice of the values."""
    tables, mask, counts, powers, head_scale, width = extras
    length, heads, scale = call.length, call.heads, call.scale
    options = (tables, mask, counts, powers, head_scale)
    given, keys, values = strided(part.of(grad_out)), strided(k), strided(part.of(v))
    epilogue = (strided(part.of(terms.lepe)), strided(part.of(terms.gate)))
    grad_lepe = strided(part.of(grads.lepe))
    grad_epilogue = (grad_lepe, strided(part.of(grads.gate)))
    into_keys = (strided(grads.k), strided(part.of(grads.v)))
    query, logsumexp = state.query, state.logsumexp
    sums = part.of_sums(state.state, state.norm, state.mean_v)
    scratch: list[Any] = [None] * 13
    if call.backward_scratch.size:
        scratch = call.backward_scratch.carve(q)
    *some, mean_parts, query_parts, mean, grad_query, scales, of_queries, of_keys = scratch
    if part.one_kernel:
        part.backward(
            fixed, given, strided(q), keys, values, strided(grads.q), *into_keys,
            epilogue, grad_epilogue, *options, scales, of_queries, sums, query, logsumexp,
            length, width, heads, call.wide.chunk, scale,
        )  # fmt: skip
        return Shares(
            None if scales is None else scales.sum(0),
            None if of_queries is None else of_queries.sum((0, 1)),
        )

    wide, summing = call.wide, call.summing
    grad_sums = part.of_sums(*some[:3])
    parts = part.of_sums(*some[3:]) if call.merging else grad_sums
    queries = (strided(q), strided(grads.q), epilogue, grad_epilogue, *options, sums)
    part.query(
        fixed, given, *queries, None, parts, None if query is not None else of_queries,
        length, width, heads, summing.chunk, scale,
    )  # fmt: skip
    if call.merging:
        part.merge(parts, grad_sums)
    if logsumexp is not None:
        part.key_mean(
            fixed, keys, values, *options, query, logsumexp, grad_sums,
            mean if mean_parts is None else mean_parts,
            length, width, heads, wide.chunk, scale,
        )  # fmt: skip
        if mean_parts is not None:
            part.sum(mean_parts, mean, call.plan.statistics)
    part.key(
        fixed, keys, values, *into_keys, *options, query, logsumexp, grad_sums,
        mean, grad_query if query_parts is None else query_parts, of_keys,
        length, width, heads, wide.chunk, scale,
    )  # fmt: skip
    if query_parts is not None:
        part.sum(query_parts, grad_query, call.plan.features)
    if query is not None:  # what the gate and the gradient of the output have made already
        part.query_again(
            fixed, given if grad_lepe is None else grad_lepe, *queries, grad_query, parts,
            of_queries, length, width, heads, wide.chunk, scale,
        )  # fmt: skip
    shares = Shares()
    if head_scale is not None:
        grad_state = grad_sums[0]
        assert grad_state is not None and sums[0] is not None
        shares = shares._replace(head_scale=(grad_state * sums[0]).sum((0, 2, 3)))
    if of_queries is not None:
        shares = shares._replace(powers=of_queries.sum((0, 1)) + of_keys.sum((0, 1)))
    return shares
