"""What of a padded batch is image: the state that a forward pass on such a batch runs under."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class ValidRegion:
    """The part of each image of a batch that is no padding, on maps of any stride.

    Attributes:
        image_size: Height and width of the padded images.
        valid_sizes: Height and width of each image, in pixels.
        used: Whether anything has asked for a map yet.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        valid_sizes: Sequence[tuple[int, int]],
        rounds_down: bool = False,
    ) -> None:
        """Keep the sizes.

        Args:
            image_size: Height and width of the padded images.
            valid_sizes: Height and width of each image.
            rounds_down: Maps leave incomplete patches out, if there is at least one other.
        """
        self.image_size = image_size
        self.valid_sizes = tuple(valid_sizes)
        self.rounds_down = rounds_down
        self.used = False
        self._masks: dict[tuple[int, int, torch.device], Tensor] = {}

    def map_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Valid height and width of each image on a map of this size."""
        self.used = True
        rows, cols = zip(*self.valid_sizes, strict=True)
        return list(
            zip(
                self._along(height, self.image_size[0], rows),
                self._along(width, self.image_size[1], cols),
                strict=True,
            )
        )

    def _along(self, side: int, image_side: int, valid: tuple[int, ...]) -> list[int]:
        if side >= image_side:  # the images, or the images as the model itself pads them further
            return list(valid)
        stride = next((s for s in _STRIDES if self._places(image_side, s) == side), None)
        # Another stride than a power of two: exact if it divides the side of the images.
        return [self._places(n, stride or image_side / side) for n in valid]

    def _places(self, length: int, stride: float) -> int:
        return max(int(length // stride), 1) if self.rounds_down else -int(-length // stride)

    def mask(self, height: int, width: int, device: torch.device) -> Tensor:
        """Padding of a map: [B, height, width] bool, True for padding."""
        key = (height, width, device)
        if key in self._masks:
            return self._masks[key]
        sizes = torch.tensor(self.map_sizes(height, width)).to(device, non_blocking=True)
        beyond_row = torch.arange(height, device=device) >= sizes[:, 0, None]
        beyond_col = torch.arange(width, device=device) >= sizes[:, 1, None]
        mask = beyond_row[:, :, None] | beyond_col[:, None]
        if not torch.compiler.is_compiling():  # where a side effect would break the graph
            self._masks[key] = mask
        return mask


_STRIDES = tuple(2**i for i in range(1, 11))


class _Local(threading.local):
    """The region of this thread's forward pass; not a `ContextVar`, which Dynamo cannot trace."""

    region: ValidRegion | None = None


_local = _Local()


def valid_region() -> ValidRegion | None:
    """The region that this thread's forward pass runs under; None if all is image."""
    return _local.region


@contextmanager
def use_valid_region(region: ValidRegion | None) -> Iterator[None]:
    """Run what stands inside under this region."""
    before = _local.region
    _local.region = region
    try:
        yield
    finally:
        _local.region = before
