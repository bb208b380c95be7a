"""Outputs that are made of maps when they are read: masked maps, principal components, heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vitlinear.errors import UserError, one_line

from .memory import MARGIN, peak_bytes, rows_that_fit
from .tissue import Mask

Shape = tuple[int, int, int]
PROBE_UNITS = 24  # rows of the coarsest map in the maps that a head is tried on
PROBE_COLUMNS = 8


@dataclass(frozen=True)
class PCA:
    """The three first principal components of a map, as an image of 8 bits.

    Channels are centred. A component is 0 at three standard deviations below its mean, and 255 at
    three above. Its largest weight is positive.

    Attributes:
        of: The map: ``'features'``, or the number of one.
    """

    of: str | int = "features"


@dataclass(frozen=True, eq=False)
class Head:
    """A module on one map or on several, such as the logits of a segmentor.

    Attributes:
        module: Takes a map [1, C, h, w], or the list of the maps, and gives a map.
        of: The maps: ``'features'``, a number, or several numbers from the finest to the coarsest.
    """

    module: Callable[..., Tensor]
    of: str | int | Sequence[int] = "features"

    @property
    def maps(self) -> tuple[str | int, ...]:
        """Names of the maps."""
        return tuple(self.of) if self.several else (self.of,)  # type: ignore[arg-type, return-value]

    @property
    def several(self) -> bool:
        """Whether the module takes a list of maps."""
        return isinstance(self.of, Iterable) and not isinstance(self.of, str)


class View(Protocol):
    """A map that is made when it is read."""

    shape: Shape
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> Tensor:
        """Rows as [1, stop - start, W, C]."""


class MaskedMap:
    """A map that holds NaN, or 0 if it holds integers, where a mask leaves places out."""

    def __init__(self, made: View, mask: Mask) -> None:
        """Keep both."""
        self.made = made
        self.mask = mask
        self.shape = made.shape
        self.dtype = made.dtype

    def read(self, start: int, stop: int) -> Tensor:
        """See `View`."""
        left_out = ~self.mask.rows(self.shape, start, stop)[None, :, :, None]
        x = self.made.read(start, stop)
        value = math.nan if x.is_floating_point() else 0
        return x.masked_fill(left_out.to(x.device), value)


class PrincipalComponents:
    """See `PCA`."""

    dtype = torch.uint8

    def __init__(self, made: View, mask: Mask | None, rows: int) -> None:
        """Take the sums over a map.

        Args:
            made: The map.
            mask: Places that count; None for all.
            rows: Read at once.
        """
        self.made = made
        self.rows = rows
        height, width, channels = made.shape
        self.shape = (height, width, 3)
        number = 0
        total = torch.zeros(channels, dtype=torch.float64)
        squares = torch.zeros(channels, channels, dtype=torch.float64)
        shift: Tensor | None = None
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            x = made.read(start, stop)[0].to("cpu", torch.float64).flatten(0, 1)
            if mask is not None:
                x = x[mask.rows(made.shape, start, stop).flatten()]
            if not len(x):
                continue
            if shift is None:  # so that squares lose nothing where a mean is large
                shift = x.mean(0)
            x = x - shift
            number += len(x)
            total += x.sum(0)
            squares += x.T @ x
        if shift is None:
            raise UserError("the mask leaves no place of the map: there are no components")
        mean = total / number
        self.mean = shift + mean
        variances, vectors = torch.linalg.eigh(squares / number - torch.outer(mean, mean))
        count = min(3, channels)
        vectors = vectors.flip(1)[:, :count]
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        deviations = variances.flip(0)[:count].clamp(min=0).sqrt()
        self.weights = torch.zeros(channels, 3, dtype=torch.float64)
        self.weights[:, :count] = vectors * signs / (6 * deviations).clamp(min=1e-12)

    def read(self, start: int, stop: int) -> Tensor:
        """See `View`."""
        out = torch.empty((1, stop - start, *self.shape[1:]), dtype=self.dtype)
        for first in range(start, stop, self.rows):
            last = min(first + self.rows, stop)
            x = self.made.read(first, last).to("cpu", torch.float64)
            colours = (255 * (0.5 + (x - self.mean) @ self.weights)).round().clamp(0, 255)
            out[:, first - start : last - start] = colours
        return out


class HeadMap:
    """See `Head`; bands of rows bring along the rows around them that the head looks at."""

    def __init__(self, head: Head, shapes: Sequence[Shape], budget: int, example: Tensor) -> None:
        """Find out what the head looks at, by trying it on small maps.

        Args:
            head: The head.
            shapes: Of its maps, which `use` sets.
            budget: Bytes for a band.
            example: Whose type and device maps get.

        Raises:
            UserError: The head sees all rows at once, the maps do not fit together, bands do not
                give what the head makes of whole maps, or the smallest one does not fit.
        """
        self.head = head
        self.shapes = shapes
        self.example = example
        self.name = f"the head ({type(head.module).__name__})"
        if isinstance(head.module, nn.Module) and head.module.training:
            raise UserError(f"{self.name} is in training mode: call its eval() first")
        coarse = shapes[-1]
        self.units = coarse[0]
        self.ratios = []
        for shape in shapes:
            ratio = shape[0] // coarse[0]
            if shape[:2] != (ratio * coarse[0], ratio * coarse[1]):
                sizes = ", ".join(f"{x[0]} x {x[1]}" for x in shapes)
                raise UserError(
                    f"{self.name} takes several maps, whose sizes are {sizes}: each must be a "
                    "multiple of the last one; pad or crop the image to a multiple of its stride"
                )
            self.ratios.append(ratio)
        tried = self._try()
        width = coarse[1] * tried.shape[2] // PROBE_COLUMNS
        self.shape = (self.units * self.scale, width, tried.shape[3])
        self.dtype = tried.dtype
        some = self._random()
        taken = peak_bytes(lambda: self._run(some)) + sum(x.nbytes for x in some)
        self.per_unit = MARGIN * taken * coarse[1] / (PROBE_UNITS * PROBE_COLUMNS)
        rows_that_fit(
            int(2 * self.reach * self.per_unit), int(self.per_unit), self.units, budget, self.name
        )
        self.use((), budget)

    def use(self, maps: Sequence[View], budget: int) -> None:
        """Set the maps, and the bytes for a band."""
        self.maps = maps
        self.band_units = max(int(budget / self.per_unit) - 2 * self.reach, 1)

    def _random(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randn(
                (1, PROBE_UNITS * ratio, PROBE_COLUMNS * ratio, shape[2]), generator=generator
            ).to(self.example)
            for shape, ratio in zip(self.shapes, self.ratios, strict=True)
        ]

    def _run(self, maps: Sequence[Tensor]) -> Tensor:
        given = [x.permute(0, 3, 1, 2) for x in maps]
        out: Any = self.head.module(given if self.head.several else given[0])
        if not isinstance(out, Tensor) or out.dim() != 4 or out.shape[0] != 1:
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise UserError(f"{self.name} must give a map [1, K, h, w]; it gave {shape}")
        return out.permute(0, 2, 3, 1)

    def _try(self) -> Tensor:
        whole = self._random()
        try:
            out = self._run(whole)
        except UserError:
            raise
        except Exception as error:
            names = ", ".join(map(str, self.head.maps))
            channels = ", ".join(str(shape[2]) for shape in self.shapes)
            raise UserError(
                f"{self.name} does not take what it is given, map {names} of {channels} channels: "
                f"{one_line(error)}"
            ) from error
        self.scale, rest = divmod(out.shape[1], PROBE_UNITS)
        if rest or not self.scale or out.shape[2] % PROBE_COLUMNS:
            raise UserError(
                f"{self.name} makes {out.shape[1]} rows of {PROBE_UNITS}: streaming needs a whole "
                "number of rows for each"
            )
        self.reach = 0
        for place in (0, PROBE_UNITS - 1):
            marked = [x.clone() for x in whole]
            for x, ratio in zip(marked, self.ratios, strict=True):
                x[:, place * ratio : (place + 1) * ratio] = math.nan
            seen = self._run(marked).isnan().any(-1).any(2)[0].nonzero().flatten() // self.scale
            if not len(seen):
                raise UserError(f"{self.name} gives the same whatever its maps hold")
            self.reach = max(self.reach, int((seen - place).abs().max()))
        if self.reach >= PROBE_UNITS // 3:
            raise UserError(
                f"{self.name} looks at {self.reach} rows or more in each direction, as a pooling "
                "over the whole map does: it cannot run on bands of rows"
            )
        banded = torch.cat(
            [self._band(whole, n, n + 1, PROBE_UNITS) for n in range(PROBE_UNITS)], 1
        )
        if not torch.allclose(banded, out, rtol=1e-3, atol=1e-3 * float(out.abs().max())):
            raise UserError(
                f"{self.name} gives other values on bands of rows than on whole maps, as positions "
                "do: it cannot be streamed"
            )
        return out

    def _band(self, maps: Sequence[Any], start: int, stop: int, units: int) -> Tensor:
        first, last = max(start - self.reach, 0), min(stop + self.reach, units)
        parts = [
            (x[:, first * r : last * r] if isinstance(x, Tensor) else x.read(first * r, last * r))
            for x, r in zip(maps, self.ratios, strict=True)
        ]
        out = self._run([x.to(self.example.device, self.example.dtype) for x in parts])
        return out[:, (start - first) * self.scale : (stop - first) * self.scale]

    def read(self, start: int, stop: int) -> Tensor:
        """See `View`."""
        rows = torch.empty((1, stop - start, *self.shape[1:]), dtype=self.dtype)
        last = -(-stop // self.scale)
        for n in range(start // self.scale, last, self.band_units):
            end = min(n + self.band_units, last)
            first = n * self.scale
            part = slice(max(start, first), min(stop, end * self.scale))
            rows[:, part.start - start : part.stop - start] = self._band(
                self.maps, n, end, self.units
            )[:, part.start - first : part.stop - first]
        return rows
