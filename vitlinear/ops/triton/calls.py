"""Prepared calls: the grids, workspaces and launches of a kind of call, decided once.

The scratch memory of a call is splits of a state for each head, merged in their order: as many
splits as fill the device, and for long sequences at most a hundredth of the inputs or two states
for each processor, 4.5 MB on H100 for D = 64.

Everything that does not depend on the tensors themselves is decided once for a kind of call and
kept (`prepared`): on a GPU the kernels of a small map take less time than Python would otherwise
take to launch them (benchmarks/host_cost.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ..mechanisms import Mechanism
from ..precision import takes_tf32
from ..rotary import kernel_table_dtype
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


def programs_of_windows(slots: int, at_once: int) -> int:
    """The programs that share so many maps of one block: no more than run at once, all as long."""
    each = max(-(-slots // at_once), 1)
    return -(-slots // each)


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
            self.runs[fixed] = self._settled(fixed, self._with(config))
            self.runs[fixed](*args)

    def _settled(self, fixed: bool, run: Callable[..., Any]) -> Callable[..., Any]:
        """A launch in the configuration that was chosen, which other strides may not fit."""

        def launch(*args: Any) -> None:
            try:
                run(*args)
            except OutOfResources:
                tuning.forget(self._names[fixed], self._key)
                self.runs[fixed] = partial(self._choose_and_run, fixed)
                self.runs[fixed](*args)

        return launch

    def _with(self, config: tuning.Config) -> Callable[..., Any]:
        return partial(
            self._kernel.run,
            plan=replace(self._plan, block_tokens=config.block_tokens),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **tuning.limited(config),
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
        sum_features: Sums over splits of vectors of features, and of
        sum_statistics: the means that a softmax's gradient subtracts, once for all readers.
    """

    def __init__(self, call: Call, channels: slice | None, plan: Plan) -> None:
        self.channels = channels
        self.is_first = not plan.adds
        kind = call.kind
        summing, wide = (call.slots, call.summing.splits), (call.slots, call.wide.splits)
        self.one_kernel = call.wide.splits == 1 and plan.fits_one_kernel
        one_query = plan.key_weights == "global_query"
        forward, backward = forward_kernels, backward_kernels
        self.forward = self._of_one_kernel(forward.forward_kernel, plan, call, False)
        self.backward = self._of_one_kernel(backward.backward_kernel, plan, call, True)
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
        # Take the vectors of splits, and memory for their sum.
        self.sum_features, self.sum_statistics = (
            partial(
                forward_kernels.sum_kernel.run, splits=call.wide.splits, size=entries,
                block=lanes(entries), grid=(call.slots, 1), warmup=False, num_warps=4,
            )
            for entries in (plan.features, plan.statistics)
        )  # fmt: skip

    def _of_one_kernel(self, kernel: Any, plan: Plan, call: Call, backward: bool) -> Launch:
        """The launch of a kernel that does everything."""
        if self.one_kernel:
            plan = plan.of_windows(call.length, backward)
        programs = call.slots
        if plan.window:
            at_once = plan.programs_per_processor * processors(call.device)
            programs = programs_of_windows(call.slots, at_once)
        return Launch(kernel, (programs, 1), plan, call.kind)

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
        size: Products of queries with values; 0 where there is nothing to compute.
        out_stride: Strides of the output, [B, N, h, Dv], which is contiguous.
        table_dtype: The type of position tables.
        tables: The position tables that were used last, if kernels take them as they are, and what
            stands behind them and the width of the grid: the attentions of a stage share theirs,
            and a close look at them takes as long as the launch of a kernel.
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
        self.size = self.slots * self.length * dim * plan.values
        width = self.heads * plan.values
        self.out_stride = (self.length * width, width, plan.values, 1)
        self.table_dtype = kernel_table_dtype(dtype)
        self.tables: tuple[ReferenceType[Tensor], ReferenceType[Tensor], int, int] | None = None
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
    precision = takes_tf32() if q.dtype == torch.float32 else None
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


def remembered(
    memo: Memo | None, step: str, q: Tensor, v: Tensor, mechanism: Mechanism, terms: Terms
) -> Call:
    """As `prepared`, without looking closely at calls that have a memo."""
    if memo is None:
        return prepared(q, v, mechanism, terms)
    found = memo.get(step)
    if found is None or found[0] is not _prepared:
        found = memo[step] = _prepared, prepared(q, v, mechanism, terms)
    return found[1]
