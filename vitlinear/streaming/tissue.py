"""Which places of a map are worth keeping: those of a mask, of tissue, or of data in a raster.

A mask acts on outputs alone. What is kept is exactly what it would be without a mask: it has seen
the places that are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vitlinear.errors import UserError

CELL = 32  # pixels of the image in a cell of the mask, in each direction


class Source(Protocol):
    """An image that is read by rows."""

    shape: tuple[int, int, int]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [1, stop - start, W, C]."""

    def valid(self, start: int, stop: int) -> Tensor | None:
        """Where they hold data, [1, stop - start, W, C or 1]; None where all of them do."""


@dataclass
class Mask:
    """Places of an image that are kept.

    Attributes:
        cells: [h, w], True for cells that are kept.
        size: Height and width of the image in pixels.
        cell: Height and width of a cell in pixels; the last ones may be cut short.
    """

    cells: Tensor
    size: tuple[int, int]
    cell: tuple[float, float]

    def rows(self, shape: tuple[int, int, int], start: int, stop: int) -> Tensor:
        """Of some rows of a map over the image, the cells of the places' centres.

        Args:
            shape: Of the map, [H, W, C].
            start: First row.
            stop: End of the rows.

        Returns:
            [stop - start, W] bool.
        """
        places = (torch.arange(start, stop), torch.arange(shape[1]))
        rows, columns = (
            ((numbers + 0.5) * pixels / length / cell).long().clamp(max=count - 1)
            for numbers, pixels, length, cell, count in zip(
                places, self.size, shape, self.cell, self.cells.shape, strict=False
            )
        )
        return self.cells[rows][:, columns]


def make_mask(mask: Any, source: Source) -> Mask:
    """The mask that was asked for.

    Args:
        mask: ``'tissue'``, ``'valid'``, or an array [h, w] of truth values.
        source: The image.

    Raises:
        UserError: It is none of them, or the image is not one for it.
    """
    if isinstance(mask, str):
        kinds = {"tissue": tissue_cells, "valid": valid_cells}
        if mask not in kinds:
            raise UserError(
                f"there is no mask {mask!r}: give 'tissue', 'valid', or an array [h, w]"
            )
        return Mask(kinds[mask](source), source.shape[:2], (CELL, CELL))
    found = torch.as_tensor(np.asarray(mask))
    if found.dim() != 2 or found.dtype != torch.bool or not found.numel():
        raise UserError(
            f"a mask is an array [h, w] of truth values; got {tuple(found.shape)} of {found.dtype}"
        )
    height, width, _ = source.shape
    cell = (height / found.shape[0], width / found.shape[1])
    return Mask(found, (height, width), cell)


def tissue_cells(source: Source) -> Tensor:
    """Cells of 32 x 32 pixels whose mean colour is more saturated than the background.

    The saturation of a colour is (max - min) / max over its channels. Otsu's threshold (IEEE
    Transactions on Systems, Man, and Cybernetics 9, 1979) splits the cells into two classes.

    Raises:
        UserError: The image is not one of coloured pixels.
    """
    height, width, channels = source.shape
    if channels != 3:
        raise UserError(f"a tissue mask needs images of 3 colours; this one has {channels}")
    parts = []
    for start in range(0, height, CELL):
        rows = source.read(start, min(start + CELL, height))
        if rows.is_floating_point():
            raise UserError("a tissue mask needs pixels, which are integers; give a mask [h, w]")
        columns = rows.to(torch.float32).mean((0, 1))
        cells = [part.mean(0) for part in columns.split(CELL)]
        parts.append(torch.stack(cells))
    colour = torch.stack(parts)
    most, least = colour.amax(-1), colour.amin(-1)
    saturation = (most - least) / most.clamp(min=1)
    return saturation > otsu(saturation)


def valid_cells(source: Source) -> Tensor:
    """Cells of 32 x 32 pixels of which some hold data.

    Raises:
        UserError: The image does not tell where data are missing.
    """
    height = source.shape[0]
    parts = []
    for start in range(0, height, CELL):
        valid = source.valid(start, min(start + CELL, height))
        if valid is None:
            raise UserError(
                "mask='valid' needs a raster that names its value for missing data, or has a mask"
            )
        columns = valid.any(-1).any(1)[0]
        parts.append(torch.stack([part.any() for part in columns.split(CELL)]))
    return torch.stack(parts)


def otsu(values: Tensor) -> float:
    """The threshold between two classes of values from 0 to 1, of 256 steps.

    It makes the variance between the classes as large as it can be.
    """
    counts = torch.histc(values.double(), 256, 0.0, 1.0)
    centres = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    below = counts.cumsum(0)
    above = counts.sum() - below
    total = (counts * centres).cumsum(0)
    mean_below = total / below.clamp(min=1)
    mean_above = (total[-1] - total) / above.clamp(min=1)
    between = below * above * (mean_below - mean_above) ** 2
    return float((between.argmax() + 1) / 256)
