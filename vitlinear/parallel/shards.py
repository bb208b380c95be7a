"""The rows of an image that a process has, as the context of a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from vitlinear.errors import UserError
from vitlinear.layers.attention.band_attention import merge_sums
from vitlinear.layers.band import Band, Parts, rows_in_use, use_rows
from vitlinear.ops.parts import Part, QueryPart
from vitlinear.processes import lost_peer
from vitlinear.rows.reach import Rows

from .agreement import check_agreement, image_facts
from .exchange import fetch, fetch_parts, gather, register_group, total
from .levels import Cuts, Level, Plan, known_plans

MULTIPLE = 32  # pixels in a row of the last map of models of four stages; two patches of others


class RankBand(Band):
    """The rows of a map that a process has; merging and gathering are exchanges.

    Attributes:
        rows: Of the image.
    """

    def __init__(self, rows: ImageRows, level: Level, prefix: int, around: Rows | None = None):
        """Keep the place.

        Args:
            rows: Of the image.
            level: How the map lies.
            prefix: Tokens before those of the map.
            around: Rows that this band sees, if more than its own.
        """
        own = level.cuts[rows.rank]
        start, stop = around or own
        super().__init__(start, stop, (own.start, own.stop), level.height, prefix, level.cuts)
        self.rows = rows
        self.level = level

    def merge(
        self, parts: Parts, combine: Callable[[Parts, Parts], Parts], later: bool = False
    ) -> Parts:
        """See `Band`."""
        return self.rows.merge(parts, combine)

    def gather(
        self, axis: int, *parts: Tensor, lengths: Sequence[tuple[int, ...]] | None = None
    ) -> tuple[Tensor, ...]:
        """See `Band`."""
        if lengths is None:
            lengths = [(x.shape[axis],) * len(self.cuts) for x in parts]
        return tuple(self.rows.gather(x, axis, n) for x, n in zip(parts, lengths, strict=True))

    def once(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """See `Band`; each process makes it."""
        return make()

    def around(self, x: Tensor, reach: int) -> tuple[Band, Tensor]:
        """See `Band`."""
        return self._wider(x, self._reached(reach))

    def around_windows(self, x: Tensor, length: int, offset: int = 0) -> tuple[Band, Tensor]:
        """See `Band`."""
        need = []
        for start, stop in self.level.cuts:
            whole = (start - offset) // length, -((offset - stop) // length)
            need.append(Rows(*(n * length + offset for n in whole)))
        return self._wider(x, tuple(need))

    def beside(self, x: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        """The rows above and below that `around` adds to a map of the own rows, [B, rows, ...]."""
        self.check_rows(x.shape[1])
        rank = self.rows.rank
        parts = self.rows.fetch_parts(x, 1, self.level.cuts, self._inside(self._reached(reach)))
        none = x.new_empty(x.shape[0], 0, *x.shape[2:])
        if len(parts) == 1:
            return none, none
        return torch.cat([*parts[:rank], none], 1), torch.cat([none, *parts[rank + 1 :]], 1)

    def _reached(self, reach: int) -> Cuts:
        return tuple(Rows(a - reach, b + reach) for a, b in self.level.cuts)

    def _inside(self, need: Cuts) -> Cuts:
        return tuple(Rows(max(a, 0), min(b, self.height)) for a, b in need)

    def _wider(self, x: Tensor, need: Cuts) -> tuple[Band, Tensor]:
        need = self._inside(need)
        if need == self.level.cuts:
            return self, x
        self.check_rows(x.shape[1])
        wide = RankBand(self.rows, self.level, self.prefix, need[self.rows.rank])
        return wide, self.rows.fetch(x, 1, self.level.cuts, need)


class ImageRows:
    """The rows of images that a process has; a context in which parallelised models run.

    Attributes:
        height: Rows of the whole image.
        cuts: Rows of each process, from the top.
        rank: Number of this process among those that share the image.
        process_group: Their group.
        group: Its name for `vitlinear.parallel.exchange`.
    """

    def __init__(self, process_group: ProcessGroup, rank: int, cuts: Cuts) -> None:
        self.height = cuts[-1].stop
        self.cuts = cuts
        self.rank = rank
        self.process_group = process_group
        self.group = register_group(process_group)
        self._bands: dict[tuple[int, int], list[RankBand]] = {}
        self._entered: list[Any] = []

    @property
    def own(self) -> Rows:
        """The rows of this process."""
        return self.cuts[self.rank]

    def __enter__(self) -> ImageRows:
        if not torch.compiler.is_compiling():
            self._make_known_bands()
        context = use_rows(self)
        context.__enter__()
        self._entered.append(context)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Leave.

        Raises:
            LostPeerError: In place of a failed exchange with the other processes.
        """
        self._entered.pop().__exit__(kind, error, trace)
        if error is not None and (lost := lost_peer(error)):
            raise lost from error

    def band(self, plan: Plan, number: int, prefix: int = 0) -> RankBand:
        """The band of this process on a map.

        Args:
            plan: Of the model.
            number: How many of its layers lie before the map.
            prefix: Tokens before those of the map: none, or as many as the plan says.

        Raises:
            UserError: A process has no rows of a map.
        """
        key = (plan.number, prefix)
        if key in self._bands:
            return self._bands[key][number]
        bands = self._make_bands(plan, prefix)
        # What a compiled program sees of this object must not change when it is traced.
        if not torch.compiler.is_compiling():
            self._bands[key] = bands
        return bands[number]

    def _make_bands(self, plan: Plan, prefix: int) -> list[RankBand]:
        levels = [Level(self.height, self.cuts)]
        for layer in plan.layers:
            levels.append(layer.apply(levels[-1]))
        return [RankBand(self, level, prefix) for level in levels]

    def _make_known_bands(self) -> None:
        """Make the bands of all models, so that compilers need not look at how they are made."""
        for plan in known_plans():
            with contextlib.suppress(UserError):  # the model that runs says so itself
                for prefix in {0, plan.prefix}:
                    self.band(plan, 0, prefix)

    def fetch(self, x: Tensor, dim: int, bounds: Cuts, need: Cuts) -> Tensor:
        """Own rows -> those that each process needs; see `vitlinear.parallel.exchange.fetch`."""
        return fetch(x, dim, bounds, need, self.rank, self.group)

    def fetch_parts(self, x: Tensor, dim: int, bounds: Cuts, need: Cuts) -> list[Tensor]:
        """As `fetch`, by process; see `vitlinear.parallel.exchange.fetch_parts`."""
        return fetch_parts(x, dim, bounds, need, self.rank, self.group)

    def total(self, *xs: Tensor) -> tuple[Tensor, ...]:
        """The sums of tensors of one type over the processes, in one exchange."""
        flat = total(torch.cat([x.reshape(-1) for x in xs]), self.group)
        parts = flat.split([x.numel() for x in xs])
        return tuple(part.reshape(x.shape) for part, x in zip(parts, xs, strict=True))

    def merge(self, parts: Parts, combine: Callable[[Parts, Parts], Parts]) -> Parts:
        """Combine the parts of all processes, tensors of one type; see `Band.merge`.

        As sums where that can be said: what is exchanged then does not grow with the processes.
        """
        count = len(self.cuts)
        if combine is merge_sums:
            return type(parts)(self.total(*parts))
        if isinstance(parts, (QueryPart, Part)):
            summed: Any = parts.summed(self.total, lambda x: gather(x, count, self.group))
            return summed
        flat = gather(torch.cat([x.reshape(-1) for x in parts]), count, self.group)

        def part_of(numbers: Tensor) -> Parts:
            pieces = numbers.split([x.numel() for x in parts])
            made = [piece.reshape(x.shape) for piece, x in zip(pieces, parts, strict=True)]
            return type(parts)(*made) if hasattr(parts, "_fields") else type(parts)(made)

        merged = part_of(flat[0])
        for rank in range(1, count):
            merged = combine(merged, part_of(flat[rank]))
        return merged

    def gather(self, x: Tensor, axis: int, lengths: Sequence[int]) -> Tensor:
        """The tensors of all processes side by side along an axis, where they have these lengths.

        Booleans too.
        """
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        bounds = tuple(Rows(end - n, end) for end, n in zip(ends, lengths, strict=True))
        need = (Rows(0, ends[-1]),) * len(lengths)
        if x.dtype == torch.bool:
            return self.fetch(x.to(torch.uint8), axis, bounds, need).bool()
        return self.fetch(x, axis, bounds, need)


def rows_here(name: str) -> ImageRows:
    """The rows that this forward pass runs under.

    Args:
        name: Of the layer that asks.

    Raises:
        RuntimeError: There are none.
    """
    rows: ImageRows | None = rows_in_use()
    if rows is None:
        raise RuntimeError(
            f"{name} is part of a parallelised model, which runs inside of its rows alone: "
            "shard, rows = shard_rows(images, mesh), then with rows: model(shard)"
        )
    return rows


def split_rows(
    height: int,
    mesh: DeviceMesh,
    *,
    multiple: int = MULTIPLE,
    sizes: Sequence[int] | None = None,
) -> ImageRows:
    """Share the rows of images of a height among processes.

    Args:
        height: Rows of the whole images.
        mesh: Of one dimension: the processes that share an image.
        multiple: Cuts are made at multiples of it. At those of the total stride of the model no
            layer has to move rows to others; elsewhere the results are the same.
        sizes: Rows of each process, from the top, instead of nearly equal shares.

    Returns:
        The rows; the same object for the same arguments.

    Raises:
        UserError: There are fewer rows than processes, or the sizes do not fit.
    """
    if mesh.ndim != 1:
        raise UserError(
            f"rows are shared along one dimension of a mesh, got one of {mesh.ndim}: give a part "
            'of it, such as mesh["rows"]'
        )
    count = mesh.size()
    if sizes is None:
        shares = height // multiple
        if shares < count:
            shares = -(-height // multiple)
        if multiple < 1 or shares < count:
            raise UserError(
                f"{count} processes cannot share an image of {height} rows in multiples of "
                f"{multiple}; share it among fewer, or give a smaller multiple"
            )
        sizes = [multiple * (shares // count + (i < shares % count)) for i in range(count)]
        sizes[-1] += height - sum(sizes)
    if len(sizes) != count or sum(sizes) != height or min(sizes) < 1:
        raise UserError(f"sizes {list(sizes)} do not share {height} rows among {count} processes")
    ends = [sum(sizes[: i + 1]) for i in range(count)]
    cuts = tuple(Rows(end - n, end) for end, n in zip(ends, sizes, strict=True))
    return _rows(mesh.get_group(), mesh.get_local_rank(), cuts)


# One object for each split: compiled programs are those of a split, and of its object. Not by
# meshes, which are equal to those of a world that has ended.
@lru_cache(maxsize=256)
def _rows(group: ProcessGroup, rank: int, cuts: Cuts) -> ImageRows:
    return ImageRows(group, rank, cuts)


def shard_rows(
    image: Tensor,
    mesh: DeviceMesh,
    *,
    multiple: int = MULTIPLE,
    sizes: Sequence[int] | None = None,
) -> tuple[Tensor, ImageRows]:
    """The rows of this process of images that every process has as a whole; all have to call it.

    Args:
        image: [B, C, H, W].
        mesh: As `split_rows`, like the rest.
        multiple: Of the cuts.
        sizes: Rows of each process.

    Returns:
        [B, C, rows, W], and the context in which a parallelised model runs.

    Raises:
        UserError: As `split_rows`, or the images of the processes differ.
    """
    if not torch.compiler.is_compiling():
        check_agreement(image_facts(image), mesh.get_group(), image.device)
    rows = split_rows(image.shape[2], mesh, multiple=multiple, sizes=sizes)
    start, stop = rows.own
    return image[:, :, start:stop], rows


def gather_rows(x: Tensor, rows: ImageRows, *, prefix: int = 0) -> Tensor:
    """The whole of a map, or of a row of tokens, on every process.

    Args:
        x: What this process has of it: a map [B, C, rows, W], or tokens [B, prefix + rows * W, C].
        rows: Under which it was made.
        prefix: Tokens before those of the map, which all processes have.

    Returns:
        [B, C, H, W], or [B, prefix + H * W, C].

    Raises:
        UserError: It is neither a map nor tokens.
    """
    if x.dim() not in (3, 4):
        raise UserError(
            f"only maps [B, C, rows, W] and tokens [B, N, C] can be gathered, got {tuple(x.shape)}"
        )
    if x.dim() == 4:  # channels last, as maps lie in memory
        maps = x.permute(0, 2, 3, 1)
        return rows.gather(maps, 1, _lengths(maps, rows)).permute(0, 3, 1, 2)
    before, tokens = x.tensor_split([prefix], 1)
    return torch.cat((before, rows.gather(tokens, 1, _lengths(tokens, rows))), 1)


def _lengths(x: Tensor, rows: ImageRows) -> list[int]:
    """Places of every process along axis 1, which no map tells for sure."""
    own = torch.tensor([x.shape[1]], device=x.device, dtype=torch.int64)
    lengths: list[int] = gather(own, len(rows.cuts), rows.group).flatten().tolist()
    return lengths
