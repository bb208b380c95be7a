"""Which sizes of input one exported program takes, and at which it is tried."""

from __future__ import annotations

import dataclasses
import re

import torch

from vitlinear.errors import UserError
from vitlinear.models import on_meta

MOST_IMAGES, LONGEST_SIDE = 4096, 4096

# A last map of one row or column is a program of its own. Where maps leave incomplete patches out,
# 64 pixels are two rows; elsewhere they round up, so that 33 pixels are.
SHORTEST_SIDE_ROUNDING_DOWN, SHORTEST_SIDE = 64, 33
# Sides are traced from a multiple of this, and 1 more, on: of a map of ceil(side / 32) rows
# torch.export (2.11) then proves that there are at least so many, and from others on it does not.
STRIDE = 32
# Sides at which an export is tried are within this, where the range allows: checks take seconds.
CHECKED_SIDE = 288


@dataclasses.dataclass(frozen=True)
class Range:
    """Sizes of one dimension, both ends included; one that is fixed has equal ends."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Range:
        """Reads ``224`` (fixed) or ``64:1024``.

        Raises:
            ValueError: It is neither.
        """
        match = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", text)
        if not match or int(match[1]) > int(match[2] or match[1]):
            raise ValueError(f"{text!r} is neither a number nor LEAST:MOST")
        return cls(int(match[1]), int(match[2] or match[1]))

    def __str__(self) -> str:
        return f"{self.low}" if self.fixed else f"{self.low}:{self.high}"

    @property
    def fixed(self) -> bool:
        """Whether there is one size only."""
        return self.low == self.high

    def nearest(self, size: int) -> int:
        """The size of the range nearest to one."""
        return min(max(size, self.low), self.high)


def shortest_side(model: str) -> int:
    """The least height and width of one program for sizes of a range, in pixels."""
    rounds_down = getattr(on_meta(model), "rounds_down", False)
    return SHORTEST_SIDE_ROUNDING_DOWN if rounds_down else SHORTEST_SIDE


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of the input [B, C, H, W]; H and W in pixels, of which the model takes `least`."""

    batch: Range
    height: Range
    width: Range
    channels: int = 3
    least: int = SHORTEST_SIDE

    @classmethod
    def of(
        cls,
        model: str,
        channels: int = 3,
        batch: Range | None = None,
        height: Range | None = None,
        width: Range | None = None,
    ) -> Shapes:
        """The shapes asked for, by default all that one program of the model takes.

        Raises:
            UserError: A range begins below that, or only one of the sides is a range.
        """
        least = shortest_side(model)
        sides = Range(least, LONGEST_SIDE)
        for name, side in (("height", height), ("width", width)):
            if side is not None and not side.fixed and side.low < least:
                raise UserError(
                    f"--{name} {side} is too small: {model} is one program for sides of {least} "
                    f"and more; give {least}:{max(side.high, least)}, or one smaller size alone"
                )
        height, width = height or sides, width or sides
        if height.fixed != width.fixed:
            # torch.export cannot prove what it has to about divisions of the one that is left.
            raise UserError(f"--height {height} --width {width}: give two numbers, or two ranges")
        return cls(batch or Range(1, MOST_IMAGES), height, width, channels, least)

    @property
    def dynamic(self) -> dict[int, torch.export.Dim]:
        """The dimensions of more than one size, as torch.export wants them."""
        height, width = self._traced(self.height), self._traced(self.width)
        named = {0: ("batch", self.batch), 2: ("height", height), 3: ("width", width)}
        return {
            axis: torch.export.Dim(name, min=sizes.low, max=sizes.high)
            for axis, (name, sizes) in named.items()
            if not sizes.fixed
        }

    def _traced(self, side: Range) -> Range:
        """A range of sides, and up to 31 smaller ones if that helps and the model takes them."""
        low = side.low - (side.low - 1) % STRIDE
        return side if side.fixed or low < self.least else Range(low, side.high)

    def example(self) -> torch.Tensor:
        """Zeros to trace with: sizes that differ, so that none is taken for another."""
        height, width = self.height.nearest(160), self.width.nearest(192)
        if height == width:
            height = self.height.low
        return torch.zeros(self.batch.nearest(2), self.channels, height, width)

    def checked(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """Sizes to try: the smallest, about the model's own, and one not square; without doubles.

        Args:
            height: What the model is made for.
            width: Likewise.
        """
        own = (
            self.height.nearest(min(height, CHECKED_SIDE)),
            self.width.nearest(min(width, CHECKED_SIDE)),
        )
        other = self.height.nearest(CHECKED_SIDE - 17), self.width.nearest(CHECKED_SIDE // 2 + 3)
        sides = ((self.height.low, self.width.low), own, other)
        batches = (self.batch.low, self.batch.nearest(2), self.batch.nearest(3))
        sizes = [(b, self.channels, *side) for b, side in zip(batches, sides, strict=True)]
        return list(dict.fromkeys(sizes))

    def __str__(self) -> str:
        return f"{self.batch} x {self.channels} x {self.height} x {self.width}"
