"""3x3 depthwise convolution of maps [B, C, H, W] with a kernel for each sample and channel."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor


def _columns(x: Tensor) -> list[Tensor]:
    """Neighbours to the left, own places and neighbours to the right, [B, C, H + 2, W] each."""
    width = x.shape[3]
    x = F.pad(x, (1, 1, 1, 1))
    return [x[..., j : j + width] for j in range(3)]


def neighbours(x: Tensor) -> Iterator[Tensor]:
    """Maps of the nine neighbours of each place, row by row, 0 beyond the map."""
    height, columns = x.shape[2], _columns(x)
    for i in range(3):
        for column in columns:
            yield column[:, :, i : i + height]


def conv_per_sample(x: Tensor, kernels: Tensor, batch: int | None) -> Tensor:
    """`vitlinear.layers.conv.dynamic_conv.conv_per_sample` on a map [B, C, H, W].

    Args:
        x: [B, C, H, W].
        kernels: [B, C, 9], row by row.
        batch: B; None where it varies. With one, all samples are one convolution.

    Returns:
        [B, C, H, W].
    """
    _, channels, height, width = x.shape
    if batch is not None:
        count = batch * channels
        maps, kernel = x.reshape(1, count, height, width), kernels.reshape(count, 1, 3, 3)
        return F.conv2d(maps, kernel, padding=1, groups=count).reshape(x.shape)
    columns = _columns(x)
    rows = []  # summed before they are shifted: three slices of rows instead of nine
    for i in range(3):
        row = columns[0] * kernels[:, :, 3 * i, None, None]
        for j in (1, 2):
            row = row + columns[j] * kernels[:, :, 3 * i + j, None, None]
        rows.append(row[:, :, i : i + height])
    return rows[0] + rows[1] + rows[2]
