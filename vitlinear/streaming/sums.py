"""Sums over the bands of one step, which run one after the other.

A layer that needs the sum over all bands stops the forward pass of a band until the sum is known:
the step then goes over its bands again. It goes over them once more than its layers wait for sums,
two or three times for a linear attention.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitlinear.layers.band import Band, Parts

from .peers import Peers


class Unknown(Exception):
    """A sum over all bands is not known yet: the forward pass of this band ends here."""


class Sums:
    """The sums of a step, known and pending, in the order in which its layers ask for them.

    Attributes:
        known: Sums over all bands.
        pending: Sums over the bands so far.
        combines: What makes one sum of two, for those that are pending.
        kept: What `Band.once` keeps.
        keeps: Whether there is memory for what `Band.keep` keeps.
        of_bands: That, by the first own row and its key.
    """

    def __init__(self) -> None:
        self.known: list[Any] = []
        self.pending: list[Any] = []
        self.combines: list[Callable[[Any, Any], Any] | None] = []
        self.kept: dict[int, Tensor] = {}
        self.keeps = False
        self.of_bands: dict[tuple[int, object], Tensor] = {}

    @property
    def gathers(self) -> bool:
        """Whether something pending is as large as the map."""
        return any(isinstance(part, Pieces) for part in self.pending)

    def finish_pass(self, peers: Peers) -> bool:
        """Make known what is pending, all bands having been seen; whether something was.

        Args:
            peers: The processes that have seen some of the bands each.
        """
        of_all = peers.share(self.pending)
        if peers.size > 1:
            self.pending = peers.first(self._merged(of_all) if peers.rank == 0 else None)
        for part in self.pending:
            self.known.append(_beside(part) if isinstance(part, Pieces) else part)
        waited = bool(self.pending)
        self.pending, self.combines = [], []
        return waited

    def _merged(self, of_all: list[list[Any]]) -> list[Any]:
        """Sums pending on all processes, each a list as long as this one's, or empty."""
        merged = []
        for place, combine in enumerate(self.combines):
            parts = [pending[place] for pending in of_all if pending]
            if combine is None:
                pieces = [piece for part in parts for piece in part.pieces]
                merged.append(Pieces(parts[0].axis, pieces))
            else:
                merged.append(functools.reduce(combine, parts))
        return merged


@dataclass
class Pieces:
    """Tensors that are to stand side by side along an axis, those of each band in a list."""

    axis: int
    pieces: list[list[Tensor]] = field(default_factory=list)


def _beside(gathered: Pieces) -> tuple[Tensor, ...]:
    """The pieces of all bands as one tensor each."""
    return tuple(torch.cat(x, gathered.axis) for x in zip(*gathered.pieces, strict=True))


def _like(parts: Parts, values: Iterable[Tensor]) -> Parts:
    """Values as a tuple of the kind of others: a record has plain tuples."""
    return type(parts)(*values) if hasattr(parts, "_fields") else type(parts)(values)


class StreamedBand(Band):
    """A band of a step whose bands run one after the other."""

    def __init__(self, sums: Sums, **place: Any) -> None:
        """Keep the sums of the step; ``place`` as `Band`."""
        super().__init__(**place)
        self.sums = sums
        self.asked = 0
        self.repeats = len(self.cuts) > 1

    def merge_made(
        self, make: Callable[[], Parts], combine: Callable[[Parts, Parts], Parts]
    ) -> Parts:
        """See `Band`."""
        if self.repeats and self.asked < len(self.sums.known):
            number, self.asked = self.asked, self.asked + 1
            return self.sums.known[number]
        return self.merge(make(), combine)

    def keep(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """See `Band`."""
        if not self.sums.keeps:
            return make()
        place = (self.own[0], key)
        if place not in self.sums.of_bands:
            self.sums.of_bands[place] = make()
        return self.sums.of_bands[place]

    def merge(
        self, parts: Parts, combine: Callable[[Parts, Parts], Parts], later: bool = False
    ) -> Parts:
        """See `Band`; NaN for sums that are needed later and not known yet."""
        number, self.asked = self.asked, self.asked + 1
        if len(self.cuts) == 1:
            return parts
        if number < len(self.sums.known):
            return _like(parts, self.sums.known[number])
        pending = self.sums.pending
        place = number - len(self.sums.known)
        if place < len(pending):
            pending[place] = combine(_like(parts, pending[place]), parts)
        else:
            pending.append(parts)
            self.sums.combines.append(combine)
        if not later:
            raise Unknown
        return _like(parts, [torch.full_like(x, math.nan) for x in parts])

    def gather(
        self, axis: int, *parts: Tensor, lengths: Sequence[tuple[int, ...]] | None = None
    ) -> tuple[Tensor, ...]:
        """See `Band`."""
        number, self.asked = self.asked, self.asked + 1
        if len(self.cuts) == 1:
            return parts
        if number < len(self.sums.known):
            return self.sums.known[number]
        pending = self.sums.pending
        place = number - len(self.sums.known)
        if place == len(pending):
            pending.append(Pieces(axis))
            self.sums.combines.append(None)
        # Copies, so that nothing else of the band stays in memory.
        copies = [x.clone(memory_format=torch.contiguous_format) for x in parts]
        pending[place].pieces.append(copies)
        raise Unknown

    def once(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """See `Band`."""
        if id(key) not in self.sums.kept:
            self.sums.kept[id(key)] = make()
        return self.sums.kept[id(key)]
