"""Runs the steps of a model over bands of rows."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vitlinear.errors import UserError
from vitlinear.layers.band import use_band
from vitlinear.rows.reach import Rows
from vitlinear.rows.steps import Step

from .maps import FileMap, RowMap
from .memory import (
    RESERVE,
    amount,
    give_back_memory,
    measured_bytes,
    peak_bytes,
    resident,
    rows_that_fit,
)
from .peers import Peers, moved
from .record import Position, Record
from .sinks import Writer
from .sums import StreamedBand, Sums, Unknown

KEPT_MARGIN = 1.1  # over the own rows: what is kept has the rows around them too
FULL = 0.75  # of the memory, from which on the allocator gives back what it keeps
KEEPING_ROWS = 32  # of a band, below which nothing is kept

Shape = tuple[int, int, int]
Cuts = tuple[tuple[int, int], ...]


class Readable(Protocol):
    """A map, or an image, that is read by rows."""

    shape: Shape
    prefix: Tensor | None

    def read(self, start: int, stop: int) -> Tensor:
        """Rows as [1, stop - start, W, C]."""


@dataclass
class Plan:
    """A step with the sizes of its maps.

    Attributes:
        step: The step.
        before: Height, width and channels of its input.
        after: Of its output.
    """

    step: Step
    before: Shape
    after: Shape

    def of_width(self, width: int) -> Plan:
        """The same for a map of another width, counted in its output."""
        if width == self.after[1]:
            return self
        before, after = (
            (shape[0], columns, shape[2])
            for shape, columns in ((self.before, width * self.step.stride), (self.after, width))
        )
        return Plan(self.step, before, after)

    def rows_after(self, rows: int) -> int:
        """Rows that some rows of the input become."""
        if rows == self.before[0]:
            return self.after[0]
        for conv in self.step.convs:
            # A convolution that leaves incomplete patches out pads with less; what comes of the
            # end of a band is dropped anyway.
            rows = -(-rows // conv.stride)
        return rows


def plan_steps(steps: list[Step], image: Shape, example: Tensor) -> list[Plan]:
    """The sizes of all maps, by running strided steps on images of one column and of one row.

    Args:
        steps: Of the model.
        image: Height, width and channels.
        example: Whose type and device images have.
    """
    plans: list[Plan] = []
    shape = image
    for step in steps:
        after = shape
        if step.strided:
            height, width, channels = shape
            tall, _ = step.run(example.new_zeros(1, height, 1, channels), None)
            wide, _ = step.run(example.new_zeros(1, 1, width, channels), None)
            after = (tall.shape[1], wide.shape[2], wide.shape[3])
        elif not plans or step.name == "final":
            some, _ = step.run(example.new_zeros(1, 1, 1, shape[2]), None)
            after = (*shape[:2], some.shape[3])
        plans.append(Plan(step, shape, after))
        shape = after
    return plans


def run_band(
    plan: Plan, source: Readable, own: Rows, cuts: Cuts, sums: Sums, example: Tensor
) -> tuple[Tensor, Tensor | None]:
    """One band of a step: the own rows of the output, and the tokens before them.

    Args:
        plan: The step.
        source: Its input.
        own: Rows of the output.
        cuts: Of all bands.
        sums: Of the step.
        example: Whose type and device the band gets.

    Raises:
        Unknown: It waits for a sum over all bands.
    """
    step = plan.step
    needed = step.rows_needed(own, plan.before[0])
    x = source.read(*needed).to(example.device, example.dtype)
    start = needed.start // step.stride
    rows = plan.rows_after(needed.stop - needed.start)
    if needed.stop == plan.before[0]:
        rows = plan.after[0] - start
    prefix = source.prefix
    band = StreamedBand(
        sums,
        start=start,
        stop=start + rows,
        own=(own.start, own.stop),
        height=plan.after[0],
        prefix=_prefix_of(step, prefix),
        cuts=cuts,
    )
    # A band of all rows is the map itself, with whatever is faster for that.
    with use_band(None if own.stop - own.start == plan.after[0] else band):
        y, prefix = step.run(x, prefix)
    expected = (1, rows, *plan.after[1:])
    if tuple(y.shape) != expected:
        raise UserError(
            f"{step.name} gave a band of shape {tuple(y.shape)} where {expected} was expected; "
            "streaming does not know what it does"
        )
    return y[:, own.start - start : own.stop - start], prefix


def _prefix_of(step: Step, prefix: Tensor | None) -> int:
    return 0 if prefix is None else prefix.shape[1]


class Runner:
    """Runs steps one after the other, and keeps the maps that are asked for."""

    def __init__(
        self,
        example: Tensor,
        memory: int,
        folder: Path | None,
        record: Record | None,
        band_rows: int | None,
        progress: bool,
        peers: Peers,
    ) -> None:
        """Keep how to run.

        Args:
            example: Whose type and device bands get.
            memory: Bytes that the process may hold, what it holds already among them.
            folder: Where maps are kept in files; None to keep them in memory.
            record: Of what was finished; None without a folder.
            band_rows: Rows of the output in a band; None for as many as fit.
            progress: Show a progress bar.
            peers: The processes that share the bands.
        """
        self.example = example
        # Counted once: what bands have freed the allocator keeps for the next ones.
        self.memory = memory - resident() - RESERVE
        self.limit = memory
        self.folder = folder
        self.record = record
        self.band_rows = band_rows
        self.progress = progress
        self.peers = peers
        self.keeping: set[int] = set()  # numbers of the steps in which bands keep what they made

    def make_map(self, number: int, shape: Shape, keep: bool = False) -> RowMap:
        """A map for the output of a step."""
        if self.folder is None:
            return RowMap(shape, self.example.dtype)
        path = self.folder / f"map-{number}.bin"
        if self.peers.size == 1:
            return FileMap(shape, self.example.dtype, path, keep)
        # The first process makes the file, and the others open it.
        made = FileMap(shape, self.example.dtype, path, keep) if self.peers.rank == 0 else None
        self.peers.share()
        return made or FileMap(shape, self.example.dtype, path, keep=True, owned=False)

    def choose_cuts(self, plans: list[Plan], wanted: set[int]) -> list[Cuts]:
        """The rows of each band of each step, so that all fit into memory.

        Args:
            plans: The steps.
            wanted: Numbers of those whose output is kept.

        Raises:
            UserError: One does not fit; the message says what it needs.
        """
        cuts: list[Cuts] = []
        measured: dict[str, tuple[int, int]] = {}
        for number, plan in enumerate(plans):
            height = plan.after[0]
            rows = self.band_rows
            if rows is None:
                held = self._held(number, plans, wanted)
                # Most blocks of a stage are alike.
                middle = plan.step.rows_needed(Rows(height // 2, height // 2 + 1), plan.before[0])
                key = f"{[*plan.step.modules.values()]} {middle} {plan.before} {plan.after}"
                if key not in measured:
                    measured[key] = self._measure(plan)
                rows, keeps = self._rows_that_fit(plan, *measured[key], self.memory - held)
                if keeps:
                    self.keeping.add(number)
            if self.peers.size > 1:
                rows = min(rows, -(-height // self.peers.size))
            cuts.append(tuple((a, min(a + rows, height)) for a in range(0, height, rows)))
        return cuts

    def _held(self, number: int, plans: list[Plan], wanted: set[int]) -> int:
        """Bytes of the maps that are in memory while a step runs."""
        if self.folder is not None:
            return 0
        maps = {n for n in wanted if n < number} | {number, number - 1}
        return sum(self.nbytes(plans[n].after) for n in maps if n >= 0)

    def check_maps(self, plans: list[Plan], wanted: set[int]) -> None:
        """Check that the maps between steps fit into memory, where they are kept there.

        Raises:
            UserError: They do not.
        """
        if self.folder is not None:
            return
        needed = max(self._held(number, plans, wanted) for number in range(len(plans)))
        if needed > self.memory:
            raise UserError(
                f"the maps between layers need {amount(needed)} of memory, and "
                f"{amount(self.memory)} are "
                "left of what may be used: give workdir= to keep them on disk, or more by memory="
            )

    def set_aside(self, blocks: Iterable[tuple[int, str]]) -> None:
        """Leave memory for blocks that are read or written, of which one is there at a time.

        Args:
            blocks: Bytes of each, and the thing that it is of.

        Raises:
            UserError: One takes more than half of what there is.
        """
        size, name = max(blocks, default=(0, ""))
        if 2 * size > self.memory:
            raise UserError(
                f"{name} need {amount(size)} at once, which is more than half of the "
                f"{amount(self.memory)} that are left of what may be used: give more by memory="
            )
        self.memory -= size

    def left(self, maps: list[RowMap]) -> int:
        """Bytes of memory that these maps leave."""
        held = 0 if self.folder is not None else sum(made.nbytes for made in maps)
        return max(self.memory - held, RESERVE)

    def nbytes(self, shape: Shape) -> int:
        """Bytes of a map."""
        return math.prod(shape) * self.example.element_size()

    def _measure(self, plan: Plan) -> tuple[int, int]:
        """See `measured_bytes`."""
        height, width, _ = plan.after

        def measure(own: int, columns: int) -> int:
            start = (height - own) // 2
            rows = Rows(start, start + own)
            part = plan.of_width(columns)
            image = _Noise(part.before, self.example)
            cuts: Cuts = ((rows.start, rows.stop),)
            return peak_bytes(lambda: run_band(part, image, rows, cuts, Sums(), self.example))

        return measured_bytes(measure, height, width)

    def _rows_that_fit(self, plan: Plan, base: int, per_row: int, budget: int) -> tuple[int, bool]:
        """Rows of a band, and whether later passes find what earlier ones made."""
        height, name = plan.after[0], plan.step.name
        rows = rows_that_fit(base, per_row, height, budget, name)
        if rows == height:
            return rows, False
        gathered = gathered_bytes(plan, self.example)
        if 2 * gathered > budget:
            raise UserError(
                f"{name} has softmax attention over the whole map, whose keys and values need "
                f"{amount(2 * gathered)}; {amount(budget)} are left: give more by memory=, or take "
                "a model that is linear in all stages"
            )
        if gathered:
            return rows_that_fit(base, per_row, height, budget - 2 * gathered, name), False
        # What is kept may take memory from the bands, as long as these do not become so low that
        # the rows around them count.
        kept = int(_channels(plan, "row_keep") * self.nbytes((*plan.after[:2], 1)) * KEPT_MARGIN)
        if not kept:
            return rows, False
        least = base + max(KEEPING_ROWS, 16 * plan.step.reach(height)) * per_row
        if kept + least > budget:
            return rows, False
        return rows_that_fit(base, per_row, height, budget - kept, name), True

    @torch.no_grad()
    def run(
        self,
        plans: list[Plan],
        image: Readable,
        wanted: set[int],
        open_writers: Callable[[int, RowMap], list[Writer]],
    ) -> dict[int, RowMap]:
        """Run the steps.

        Args:
            plans: The steps.
            image: What the first one reads.
            wanted: Numbers of the steps whose output is kept; the last one among them.
            open_writers: What writes the output of a step, by its number, while its bands come.

        Returns:
            The maps by these numbers.

        Raises:
            UserError: Memory or disk do not suffice, or the image cannot be read.
        """
        self.check_maps(plans, wanted)
        cuts = self.peers.first(self.choose_cuts(plans, wanted))
        kept: dict[int, RowMap] = {}
        source: Readable = image
        first = 0
        position = Position() if self.record is None else self.record.load()
        position = moved(position, self.example.device)
        sums = position.sums
        sums.known, sums.pending = moved((sums.known, sums.pending), self.example.device)
        if self.peers.size > 1:  # what a step had begun counts for one process alone
            position = self.peers.first(Position(finished=position.finished))
        for number in sorted(position.finished):
            made = self.make_map(number, plans[number].after, keep=True)
            made.prefix = position.finished[number]
            for writer in open_writers(number, made):
                writer.write_until(made.shape[0])
            kept[number] = made
            source, first = made, number + 1
        bar = tqdm(total=len(plans), initial=first, disable=not self.progress, unit="step")
        with bar:
            for number in range(first, len(plans)):
                plan = plans[number]
                bar.set_postfix_str(plan.step.name)
                if not position.cuts:
                    made = self.make_map(number, plan.after)
                    position.cuts = cuts[number]
                else:
                    made = self.make_map(number, plan.after, keep=True)
                position.sums.keeps = number in self.keeping
                writers = open_writers(number, made)
                self._run_step(plan, source, made, position, writers, bar)
                source = made
                kept[number] = source
                position.finished[number] = source.prefix
                position.cuts, position.band, position.sums = (), 0, Sums()
                position.prefix = None
                # Files go when the record no longer names them, and with peers when the first one
                # has written it, and its sinks.
                old = [n for n in kept if n < number and n not in wanted]
                for n in old:
                    del position.finished[n]
                self._note(position)
                self.peers.share()
                if self.record is not None and self.peers.rank == 0:
                    self.record.delete_sums()
                for n in old:
                    kept.pop(n).delete()
                bar.update()
        return kept

    def _run_step(
        self,
        plan: Plan,
        source: Readable,
        target: RowMap,
        position: Position,
        writers: list[Writer],
        bar: Any,
    ) -> None:
        """One step: passes over the bands until no sum is missing.

        With peers, each process runs its own bands, and what is noted for a later call is the end
        of the step.
        """
        cuts, sums = position.cuts, position.sums
        alone = self.peers.size == 1
        while True:
            bands = range(position.band, len(cuts)) if alone else self.peers.bands(len(cuts))
            for i in bands:
                bar.set_postfix_str(f"{plan.step.name}, band {i + 1} of {len(cuts)}")
                self._run_band(plan, source, target, position, i, writers if alone else [])
                self._give_back()
                if alone:
                    position.band = i + 1
                    self._note(position)
            if not sums.finish_pass(self.peers):
                break
            position.band = 0
            if alone and self.record is not None:
                self.record.save_sums(position)
                self.record.save(position)
        prefixes = self.peers.share(position.prefix)
        target.prefix = position.prefix = prefixes[0]
        for writer in writers:
            writer.write_until(plan.after[0])

    def _run_band(
        self,
        plan: Plan,
        source: Readable,
        target: RowMap,
        position: Position,
        number: int,
        writers: list[Writer],
    ) -> None:
        own = Rows(*position.cuts[number])
        try:
            y, prefix = run_band(plan, source, own, position.cuts, position.sums, self.example)
        except Unknown as stopped:
            # The frames that were left hold the tensors of the band.
            traceback.clear_frames(stopped.__traceback__)
            return
        target.write(own.start, y)
        for writer in writers:
            writer.write_until(own.stop)
        if position.prefix is None:
            position.prefix = prefix

    def _give_back(self) -> None:
        """Return memory to the system before it runs short: the next band is faster on memory that
        the allocator has kept, and finds it in pieces that may not fit.
        """
        if resident() > FULL * self.limit:
            give_back_memory()

    def _note(self, position: Position) -> None:
        if self.record is not None and self.peers.rank == 0:
            self.record.save(position)


class _Noise:
    """A map that is made when it is read, to measure on."""

    def __init__(self, shape: Shape, example: Tensor) -> None:
        self.shape = shape
        self.prefix: Tensor | None = None
        self._example = example

    def read(self, start: int, stop: int) -> Tensor:
        """See `RowMap`."""
        return torch.rand(
            (1, stop - start, *self.shape[1:]),
            dtype=self._example.dtype,
            device=self._example.device,
        )


def gathered_bytes(plan: Plan, example: Tensor) -> int:
    """Bytes of the keys and values that softmax attention over the whole map keeps in a step."""
    height, width, _ = plan.after
    return height * width * _channels(plan, "row_gather") * example.element_size()


def _channels(plan: Plan, method: str) -> int:
    """Channels that layers of a step want of all rows, by the method of that name."""
    layers: list[Any] = [x for module in plan.step.modules.values() for x in module.modules()]
    return sum(getattr(x, method)(plan.after[0]) for x in layers if hasattr(x, method))


def pooled(source: Readable, rows: int, kind: str, example: Tensor) -> Tensor:
    """The mean, maximum, or mean of both, over the places of a map, [1, C].

    Args:
        source: The map.
        rows: Read at once.
        kind: ``avg``, ``max`` or ``avgmax``.
        example: Whose type and device the result gets.
    """
    height, width, channels = source.shape
    dtype = torch.float64 if example.dtype == torch.float64 else torch.float32
    total = torch.zeros(1, channels, dtype=torch.float64)
    top = torch.full((1, channels), -math.inf, dtype=dtype)
    for start in range(0, height, rows):
        x = source.read(start, min(start + rows, height)).to("cpu", dtype)
        total += x.sum((1, 2), dtype=torch.float64)
        top = torch.maximum(top, x.amax((1, 2)))
    mean = (total / (height * width)).to(dtype)
    pools = {"avg": mean, "max": top, "avgmax": 0.5 * (mean + top)}
    return pools[kind].to(example.device, example.dtype)


def module_example(model: nn.Module) -> Tensor:
    """A tensor of the type and on the device of a model's parameters."""
    parameter = next(model.parameters())
    return parameter.detach().new_empty(0)
