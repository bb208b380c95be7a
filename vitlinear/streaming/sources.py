"""Images of any kind, read by rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitlinear.errors import UserError, one_line


class ArraySource:
    """An array: numpy, a memory map, zarr, or whatever is sliced alike; a tensor.

    Attributes:
        shape: Height, width and channels.
        prefix: None: an image has no tokens before it.
    """

    prefix: Tensor | None = None

    def __init__(self, array: Any, channels: int, layout: str | None) -> None:
        """Look at the array.

        Args:
            array: [C, H, W] or [H, W, C].
            channels: C.
            layout: ``'CHW'`` or ``'HWC'``; None to tell by the number of channels.

        Raises:
            UserError: The shape does not fit, or fits both ways.
        """
        shape = tuple(int(n) for n in array.shape)
        fitting = [
            name
            for name, axis in (("CHW", 0), ("HWC", 2))
            if len(shape) == 3 and shape[axis] == channels and layout in (None, name)
        ]
        if not fitting:
            raise UserError(
                f"the model takes images of {channels} channels, [{channels}, H, W] or "
                f"[H, W, {channels}]; got an array of shape {shape}"
                + (f" with layout {layout}" if layout else "")
            )
        if len(fitting) > 1:
            raise UserError(
                f"an array of shape {shape} could be CHW or HWC: give layout='CHW' or 'HWC'"
            )
        self.array = array
        self.channels_first = fitting[0] == "CHW"
        height, width = shape[1:] if self.channels_first else shape[:2]
        if height * width == 0:
            raise UserError(f"the image has no pixel: its shape is {shape}")
        self.shape = (height, width, channels)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [1, stop - start, W, C], as they are.

        Raises:
            UserError: They cannot be read, or are not all there.
        """
        try:
            part = self.array[:, start:stop] if self.channels_first else self.array[start:stop]
            rows = part if isinstance(part, Tensor) else torch.from_numpy(_native(part))
        except Exception as error:
            raise UserError(
                f"cannot read rows {start} to {stop} of the image: {one_line(error)}; what was "
                "finished stays"
            ) from error
        if self.channels_first:
            rows = rows.permute(1, 2, 0)
        if tuple(rows.shape) != (stop - start, *self.shape[1:]):
            raise UserError(
                f"the image is truncated: rows {start} to {stop} came as {tuple(rows.shape)}; what "
                "was finished stays"
            )
        return rows.unsqueeze(0)


def _native(part: Any) -> np.ndarray:
    """A numpy array of a type that PyTorch knows."""
    array = np.asarray(part)
    if array.dtype == np.uint16:
        array = array.astype(np.int32)
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
