"""The rows of each process on every map of a model: whose the row was, has what comes of it.

Output row o of a layer of stride s belongs to the process that has row o * s of its input. So any
height and any cut of the image is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vitlinear.errors import UserError
from vitlinear.rows.reach import Rows

Cuts = tuple[Rows, ...]


@dataclass(frozen=True)
class Level:
    """A map: how its rows lie.

    Attributes:
        height: Rows of the whole map.
        cuts: Rows of each process, from the top.
    """

    height: int
    cuts: Cuts


@dataclass(frozen=True)
class Strided:
    """A layer that changes the number of rows.

    Attributes:
        name: In the model.
        kernel: Rows that it looks at.
        stride: Rows of its input for one of its output.
        padding: Zeros above.
        rounding: How many rows come out: ``"conv"`` as of a convolution with as much padding below
            as above; ``"ceil"`` the number divided by the stride, rounded up; ``"floor"`` rounded
            down, but at least 1; ``"pad"`` none go, zeros below make a multiple of the stride.
    """

    name: str
    kernel: int
    stride: int
    padding: int
    rounding: str

    def after(self, height: int) -> int:
        """Rows of the output."""
        if self.rounding == "ceil":
            return -(-height // self.stride)
        if self.rounding == "floor":
            return max(height // self.stride, 1)
        if self.rounding == "pad":
            return -(-height // self.stride) * self.stride
        return (height + 2 * self.padding - self.kernel) // self.stride + 1

    def apply(self, level: Level) -> Level:
        """The level of the output.

        Raises:
            UserError: A process would have no rows; the message says what to do.
        """
        height = self.after(level.height)
        step = self.stride if self.rounding == "pad" else 1
        ends = [-(-stop // self.stride) * step for _, stop in level.cuts]
        ends = [min(end, height) for end in ends[:-1]] + [height]
        starts = [0, *ends[:-1]]
        cuts = tuple(Rows(a, b) for a, b in zip(starts, ends, strict=True))
        for rank, (start, stop) in enumerate(cuts):
            if start >= stop:
                raise UserError(
                    f"process {rank} of the {len(cuts)} that share an image has no row of the map "
                    f"of {height} rows that {self.name} gives; share it among fewer, or cut it at "
                    "multiples of the total stride"
                )
        return Level(height, cuts)

    def aligned(self, level: Level) -> Cuts:
        """Rows of the input by process, moved so that those of a row of the output are together."""
        after = self.apply(level).cuts
        scale = 1 if self.rounding == "pad" else self.stride
        ends = [min(stop * scale, level.height) for _, stop in after[:-1]] + [level.height]
        return tuple(Rows(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True))


@dataclass(frozen=True, eq=False)
class Plan:
    """The strided layers of a model; one object in a process for models of the same.

    Attributes:
        layers: In order.
        prefix: Tokens before those of the maps, in blocks.
        number: Of this plan in this process.
    """

    layers: tuple[Strided, ...]
    prefix: int
    number: int

    def __reduce__(self) -> Any:
        """Copies are this one; another process has a number of its own."""
        return plan_of, (self.layers, self.prefix)


_plans: dict[tuple[tuple[Strided, ...], int], Plan] = {}


def plan_of(layers: tuple[Strided, ...], prefix: int = 0) -> Plan:
    """The plan of these layers."""
    return _plans.setdefault((layers, prefix), Plan(layers, prefix, len(_plans)))


def known_plans() -> tuple[Plan, ...]:
    """All plans that models of this process were given."""
    return tuple(_plans.values())
