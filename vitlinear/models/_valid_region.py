"""The part of a padded batch that is image, as a state that a forward pass runs under.

`vitlinear.dense.padding` sets it; gradient checkpointing sets it again for what it recomputes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class ValidRegion:
    """The part of each image of a batch that is no padding, on its maps.

    Strides are powers of two; those of models of one resolution are the side of their patches times
    powers of two, and finer maps are made of whole patches.

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
        patch_size: int = 1,
    ) -> None:
        """Keep the sizes.

        Args:
            image_size: Height and width of the padded images.
            valid_sizes: Height and width of each image.
            rounds_down: Maps leave incomplete patches out, if there is another: those of stages up
                to stride 32, those of models of one resolution at the side of their patches.
            patch_size: Side of the patches of models of one resolution.
        """
        self.image_size = image_size
        self.valid_sizes = tuple(valid_sizes)
        self.rounds_down = rounds_down
        self.patch_size = patch_size
        self.used = False
        self._masks: dict[tuple[int, int, torch.device], Tensor] = {}

    def map_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Valid height and width of each image on a map of this size.

        Raises:
            ValueError: The images have no map of this size.
        """
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
        patches, *valid_patches = (self._patches(n) for n in (image_side, *valid))
        if side > patches and side % patches == 0:
            return [n * (side // patches) for n in valid_patches]
        halvings = next((i for i in range(16) if self._halved(patches, i) == side), None)
        if halvings is None:
            raise ValueError(f"no map of images of {image_side} pixels has a side of {side}")
        return [self._halved(n, halvings) for n in valid_patches]

    def _patches(self, length: int) -> int:
        if self.rounds_down:
            return max(length // self.patch_size, 1)
        return -(-length // self.patch_size)

    def _halved(self, length: int, times: int) -> int:
        # Up to stride 32: what necks make of the last map rounds up.
        if self.rounds_down and self.patch_size == 1:
            length, times = max(length >> min(times, 5), 1), max(times - 5, 0)
        return -(-length >> times)

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
