"""Maps of padded batches, for layers that keep padding out of the parts inside them themselves.

Sizes are height and width of the part of each map that is no padding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def zero_beyond(x: Tensor, valid_sizes: list[tuple[int, int]]) -> Tensor:
    """A map [B, C, H, W] with zeros beyond the valid part of each sample."""
    heights = torch.tensor([size[0] for size in valid_sizes]).to(x.device, non_blocking=True)
    widths = torch.tensor([size[1] for size in valid_sizes]).to(x.device, non_blocking=True)
    beyond_row = torch.arange(x.shape[2], device=x.device) >= heights[:, None]
    beyond_col = torch.arange(x.shape[3], device=x.device) >= widths[:, None]
    return x.masked_fill((beyond_row[:, :, None] | beyond_col[:, None])[:, None], 0)


def halved(valid_sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sizes of what a convolution of stride 2 makes of maps of these sizes."""
    return [((size[0] + 1) // 2, (size[1] + 1) // 2) for size in valid_sizes]


def rounded_up(valid_sizes: list[tuple[int, int]], multiple: int) -> list[tuple[int, int]]:
    """Sizes as multiples of a number."""
    return [
        (
            (size[0] + multiple - 1) // multiple * multiple,
            (size[1] + multiple - 1) // multiple * multiple,
        )
        for size in valid_sizes
    ]
