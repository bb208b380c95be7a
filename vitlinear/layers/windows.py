"""Windows of a map: how many, how large, and which of their tokens are padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor


def equal_windows(size: int, limit: int) -> tuple[int, int]:
    """Split a side into as few windows as possible of at most `limit`, all of one length.

    Args:
        size: Length of the side.
        limit: Greatest length of a window; 0 for no limit.

    Returns:
        Number of windows, and their length; the last one may reach beyond the side, by less than
        the number of windows.
    """
    if limit <= 0:
        return 1, size
    count = (size + limit - 1) // limit
    return count, (size + count - 1) // count


def to_windows(
    x: Tensor, rows: tuple[int, int], cols: tuple[int, int], down: int = 0, right: int = 0
) -> Tensor:
    """[B, H, W, C] -> [B * windows, height * width, C], zeros where windows reach beyond the map.

    Args:
        x: Map.
        rows: Number and height of windows along the first side.
        cols: Number and width of windows along the second.
        down: Rows by which the windows of the padded map are shifted; those above come last.
        right: Columns, likewise.
    """
    bottom, end = rows[0] * rows[1] - x.shape[1], cols[0] * cols[1] - x.shape[2]
    if bottom != 0 or end != 0:
        x = F.pad(x, [0, 0, 0, end, 0, bottom])
    if down != 0 or right != 0:
        x = x.roll([-down, -right], [1, 2])
    return window_partition(x.contiguous(), (rows[1], cols[1])).flatten(1, 2)


def from_windows(
    x: Tensor,
    rows: tuple[int, int],
    cols: tuple[int, int],
    height: int,
    width: int,
    down: int = 0,
    right: int = 0,
) -> Tensor:
    """What `to_windows` did, undone: [B * windows, tokens, C] -> [B, height, width, C]."""
    x = window_reverse(x.contiguous(), (rows[1], cols[1]), rows[0] * rows[1], cols[0] * cols[1])
    if down != 0 or right != 0:
        x = x.roll([down, right], [1, 2])
    return x[:, :height, :width]


def window_padding(
    height: int,
    width: int,
    rows: tuple[int, int],
    cols: tuple[int, int],
    device: torch.device,
) -> Tensor | None:
    """Which tokens of `to_windows` lie beyond the map: [windows, tokens] bool, None if none do."""
    if rows[0] * rows[1] == height and cols[0] * cols[1] == width:
        return None
    beyond_row = torch.arange(rows[0] * rows[1], device=device) >= height
    beyond_col = torch.arange(cols[0] * cols[1], device=device) >= width
    mask = (beyond_row[:, None] | beyond_col)[None, :, :, None]
    return to_windows(mask, rows, cols).squeeze(-1)
