"""Rows of a map, as what a forward pass sees of an image that it does not see whole.

Whoever cuts the rows of an image into bands (`vitlinear.streaming`: one band after the other) runs
layers under a `Band`. A band holds its own rows and some of its neighbours', as many as the
convolutions reach. Results of rows near a cut are wrong, and the caller drops them. Layers that
look further than the rows around ask `band_in_use`: for the place of the band, and for what the
other bands bring to a sum.

Every layer says in the class that defines its ``forward`` how rows reach it, in the attribute
``row_rule``:

- `LOCAL`: it is made of its members and of steps on single places. What it needs of other rows is
  what its members need.
- `BANDED`: it asks `band_in_use` itself.
- ``of_method("mix")``: the class that defines this method, which ``forward`` calls, has the rule.

A layer that needs rows above and below beyond those of its members gives their number by a method
``row_reach(height)``; height is that of the whole map. One that gathers values of all rows, as
softmax attention does its keys and values, gives their channels by ``row_gather(height)``; one that
keeps something for later passes (`Band.keep`) gives its channels by ``row_keep(height)``. A layer
without a rule is unknown, and is not run on bands. `vitlinear.rows.reach` has the rules of those
of PyTorch and timm.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor

LOCAL = "local"
BANDED = "banded"


def of_method(name: str) -> str:
    """The rule of a ``forward`` that leaves it to a method what rows meet."""
    return f"of {name}"


def method_of(rule: str | None) -> str | None:
    """The method that a rule of `of_method` names; None for another rule."""
    return rule.removeprefix("of ") if rule is not None and rule.startswith("of ") else None


Parts = TypeVar("Parts", bound=tuple[Tensor, ...])


class Band:
    """The rows of a map that a forward pass sees; subclasses bring sums over all bands.

    Attributes:
        start: First row, in the numbers of the whole map.
        stop: End of the rows.
        own: Start and end of the rows that this band answers for. Those of all bands make up the
            map, so that sums count each row once.
        height: Rows of the whole map.
        prefix: Tokens that stand before those of the map, such as a class token. All bands have
            them; the first one answers for them.
        cuts: Own rows of every band, from the top.
        repeats: Whether a forward pass that waits for a sum ends and is run once more: a layer then
            does well to make each thing where it is used.
    """

    repeats = False

    def __init__(
        self,
        start: int,
        stop: int,
        own: tuple[int, int],
        height: int,
        prefix: int = 0,
        cuts: tuple[tuple[int, int], ...] = (),
    ) -> None:
        self.start = start
        self.stop = stop
        self.own = own
        self.height = height
        self.prefix = prefix
        self.cuts = cuts or (own,)

    def merge(
        self, parts: Parts, combine: Callable[[Parts, Parts], Parts], later: bool = False
    ) -> Parts:
        """Combine the parts of all bands; each calls this with its own.

        Args:
            parts: Of the own rows.
            combine: Makes one of two; the order in which it is called must not matter.
            later: What the layer merges or gathers next does not depend on the result.
        """
        raise NotImplementedError

    def merge_made(
        self, make: Callable[[], Parts], combine: Callable[[Parts, Parts], Parts]
    ) -> Parts:
        """`merge` of parts that are made only where they are not known yet.

        Args:
            make: Makes the parts of the own rows.
            combine: As `merge`.
        """
        return self.merge(make(), combine)

    def keep(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """A tensor of this band that later passes over it use again, if there is memory for it.

        Args:
            key: What it is known by in this band.
            make: Makes it, the same in every pass.
        """
        return make()

    def gather(
        self, axis: int, *parts: Tensor, lengths: Sequence[tuple[int, ...]] | None = None
    ) -> tuple[Tensor, ...]:
        """Lay the parts of all bands side by side along an axis, from the top.

        Args:
            axis: The only one in which bands may differ.
            *parts: Tensors of the own rows; each is gathered by itself.
            lengths: Of each part, its places along the axis in every band; None if they are the
                same in all bands.
        """
        raise NotImplementedError

    def around(self, x: Tensor, reach: int) -> tuple[Band, Tensor]:
        """A band that has as many rows above and below the own ones as a layer needs, and its map.

        Args:
            x: A map of this band, [B, rows, ...].
            reach: Rows above and below.

        Returns:
            This band and its map: it brings those rows along, unless a subclass fetches them.
        """
        return self, x

    def around_windows(self, x: Tensor, length: int, offset: int = 0) -> tuple[Band, Tensor]:
        """As `around`, with the rows of all windows that the own rows lie in.

        Args:
            x: A map of this band, [B, rows, ...].
            length: Rows of a window. The first and the last one of the map may be cut short.
            offset: Row at which a window begins, besides those a multiple of the length away.
        """
        return self, x

    def within(self, wide: Band, x: Tensor) -> Tensor:
        """Of a map [B, rows, ...] of a band that `around` gave, the rows of this one."""
        first = self.start - wide.start
        return x[:, first : first + self.stop - self.start]

    def own_lengths(self, width: int) -> tuple[int, ...]:
        """Of every band, the number of tokens that `own_tokens` gives."""
        tokens = ((stop - start) * width for start, stop in self.cuts)
        return tuple(n if i else n + self.prefix for i, n in enumerate(tokens))

    def own_between(self, first: int, last: int) -> tuple[int, ...]:
        """Of every band, how many of its own rows lie between two of the map."""
        return tuple(max(min(stop, last) - max(start, first), 0) for start, stop in self.cuts)

    def once(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """Call ``make`` for the first band, and keep what it makes for the others.

        Args:
            key: What it is known by, such as the layer that asks.
            make: Makes the same in every band.
        """
        raise NotImplementedError

    def check_rows(self, rows: int) -> None:
        """Check that a map is that of this band.

        Raises:
            ValueError: It has another number of rows.
        """
        if rows != self.stop - self.start:
            raise ValueError(
                f"a map of {rows} rows is not the band of {self.stop - self.start} that this "
                "forward pass sees"
            )

    def own_tokens(self, x: Tensor, axis: int = 1) -> Tensor:
        """Of tokens, in rows of equal length after the prefix, those of the own rows.

        Args:
            x: [..., prefix + rows * width, ...].
            axis: That of the tokens.

        Raises:
            ValueError: The tokens are not those of this band.
        """
        width, rest = divmod(x.shape[axis] - self.prefix, self.stop - self.start)
        if rest or width < 1:
            raise ValueError(
                f"{x.shape[axis]} tokens are not {self.prefix} and a band of "
                f"{self.stop - self.start} rows"
            )
        first = self.prefix + (self.own[0] - self.start) * width
        last = self.prefix + (self.own[1] - self.start) * width
        if self.own[0] == 0:
            first = 0
        return x.narrow(axis, first, last - first)

    def whole_windows(self, length: int, offset: int = 0) -> tuple[int, int]:
        """The rows of this band that lie in windows which it sees whole.

        Args:
            length: Rows of a window. The first and the last one of the map may be cut short.
            offset: Row at which a window begins, besides those a multiple of the length away.

        Returns:
            First row and end, in the numbers of the band; both 0 if there is none.
        """
        first = offset + math.ceil((self.start - offset) / length) * length
        last = offset + (self.stop - offset) // length * length
        if self.start == 0:
            first = 0
        if self.stop == self.height:
            last = self.height
        return (first - self.start, last - self.start) if first < last else (0, 0)

    def back_in_band(self, x: Tensor, first: int) -> Tensor:
        """A map [B, rows, W, C] of some rows as one of all rows of the band.

        The others are NaN: that is what comes out if somebody uses them after all.

        Args:
            x: Map.
            first: Number of its first row in the band.
        """
        after = self.stop - self.start - first - x.shape[1]
        return F.pad(x, (0, 0, 0, 0, first, after), value=math.nan)


class _Local(threading.local):
    """The band of this thread's forward pass; not a `ContextVar`, which Dynamo cannot trace."""

    band: Band | None = None


_local = _Local()


def band_in_use() -> Band | None:
    """The band that this thread's forward pass runs under; None if it sees the whole map."""
    return _local.band


@contextmanager
def use_band(band: Band | None) -> Iterator[None]:
    """Run what stands inside under this band."""
    before = _local.band
    _local.band = band
    try:
        yield
    finally:
        _local.band = before


# Of the process, not of a thread: of what a thread has, Dynamo sees only what compiled code sets.
_rows: Any = None


def rows_in_use() -> Any:
    """The rows that `vitlinear.parallel` splits forward passes into; None without."""
    return _rows


@contextmanager
def use_rows(rows: Any) -> Iterator[None]:
    """Run what stands inside under these rows."""
    global _rows
    before = _rows
    _rows = rows
    try:
        yield
    finally:
        _rows = before
