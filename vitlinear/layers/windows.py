"""Windows of a map: how many, how large, and which of their tokens are padding.

A split along one side is a pair (count, length) of windows. In programs compiled or exported for
any size of the map, tokens are gathered by index: views would tie the program to how the windows
happen to fit the map that it was made with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor

try:
    from torch.fx.experimental.symbolic_shapes import has_static_value
except ImportError:  # before torch 2.7: what is exported is tied to how the windows fit the map

    def has_static_value(a: int) -> bool:  # type: ignore[misc]
        """Whether a size is a plain number."""
        return True


def varies(size: int) -> bool:
    """Whether a program is being made for more than one value of this."""
    if torch.jit.is_scripting():
        return False
    else:  # noqa: RET505  TorchScript leaves out the branch not taken, but not what follows it
        return torch.compiler.is_compiling() and not has_static_value(size)


def opaque(size: int) -> int:
    """The same number, to torch.export a new one of which it knows only that it is positive.

    What it would otherwise have to prove about divisions of sizes is beyond it.
    """
    if torch.jit.is_scripting():
        return size
    else:  # noqa: RET505
        if isinstance(size, int) or not torch.compiler.is_exporting():
            return size
        size = torch.scalar_tensor(size, dtype=torch.int64).item()
        torch._check(size >= 1)
        return size


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
    return opaque(count), opaque((size + count - 1) // count)


def fixed_windows(size: int, length: int) -> tuple[int, int]:
    """Split a side into windows of a given length; the last one may reach beyond it."""
    return opaque((size + length - 1) // length), length


def fits(size: int, split: tuple[int, int]) -> bool:
    """Whether the windows are known to end where the side does."""
    count, length = split
    if varies(count) or (varies(length) and count > 1):
        return False
    # A single window whose length varies is as long as the side.
    return varies(length) or (not varies(size) and count * length == size)


def indices(split: tuple[int, int], shift: int, device: torch.device) -> Tensor:
    """Where in a side of whole windows each token of the shifted windows comes from."""
    length = split[0] * split[1]
    index = torch.arange(length, device=device) + shift
    return torch.where(index < length, index, index - length)


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
    H, W, height, width = x.shape[1], x.shape[2], rows[0] * rows[1], cols[0] * cols[1]
    if fits(H, rows) and fits(W, cols):
        if is_one(rows[0]) and is_one(cols[0]):
            return x.flatten(1, 2)
    elif varies(height) or varies(width) or varies(H) or varies(W):
        row, col = indices(rows, down, x.device), indices(cols, right, x.device)
        beyond = (row >= H)[:, None] | (col >= W)
        x = x.index_select(1, row.clamp(max=H - 1)).index_select(2, col.clamp(max=W - 1))
        x = x.masked_fill(beyond[:, :, None], 0)
        return window_partition(x, (rows[1], cols[1])).flatten(1, 2)
    else:
        x = F.pad(x, [0, 0, 0, width - W, 0, height - H])
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
    whole = fits(height, rows) and fits(width, cols)
    if whole and is_one(rows[0]) and is_one(cols[0]):
        return x.unflatten(1, [height, width])
    padded_height, padded_width = rows[0] * rows[1], cols[0] * cols[1]
    x = window_reverse(x.contiguous(), (rows[1], cols[1]), padded_height, padded_width)
    if not whole and (varies(padded_height) or varies(padded_width)):
        row = torch.arange(height, device=x.device) - down
        col = torch.arange(width, device=x.device) - right
        row = torch.where(row >= 0, row, row + padded_height)
        col = torch.where(col >= 0, col, col + padded_width)
        return x.index_select(1, row).index_select(2, col)
    if down != 0 or right != 0:
        x = x.roll([down, right], [1, 2])
    return x[:, :height, :width]


def is_one(count: int) -> bool:
    """Whether there is one window for certain."""
    return not varies(count) and count == 1


def window_padding(
    x: Tensor, rows: tuple[int, int], cols: tuple[int, int], key_padding_mask: Tensor | None
) -> Tensor | None:
    """Which tokens of `to_windows` are padding, of the map or beyond it.

    Args:
        x: Map, [B, H, W, C].
        rows: Number and height of windows along the first side.
        cols: Number and width of windows along the second.
        key_padding_mask: Padding of the map, [B, H, W] bool.

    Returns:
        [B * windows, tokens] bool, None if no token is.
    """
    if key_padding_mask is not None:
        return ~to_windows(~key_padding_mask.unsqueeze(-1), rows, cols).squeeze(-1)
    B, H, W = x.shape[0], x.shape[1], x.shape[2]
    if fits(H, rows) and fits(W, cols):
        return None
    beyond_row = torch.arange(rows[0] * rows[1], device=x.device) >= H
    beyond_col = torch.arange(cols[0] * cols[1], device=x.device) >= W
    return tokens_of_windows(beyond_row[:, None] | beyond_col, rows, cols).repeat(B, 1)


def join_maps(maps: list[Tensor], height: int, width: int) -> Tensor:
    """Maps [1, H, W, C] of several sizes as one batch, with zeros to the right and below.

    Args:
        maps: At least one.
        height: Of the batch.
        width: Of the batch.

    Returns:
        [B, height, width, C].
    """
    padded: list[Tensor] = []
    for x in maps:
        padded.append(F.pad(x, [0, 0, 0, width - x.shape[2], 0, height - x.shape[1]]))
    return torch.cat(padded)


def tokens_of_windows(x: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
    """A number for each token of a map of whole windows, [H, W] -> [windows, tokens]."""
    x = x.reshape(rows[0], rows[1], cols[0], cols[1]).permute(0, 2, 1, 3)
    return x.reshape(rows[0] * cols[0], rows[1] * cols[1])
