"""Windows of a map: how many, how large, and which of their tokens are padding.

A split along one side is a pair (count, length) of windows. In programs compiled or exported for
any size of the map, tokens are gathered by their numbers: a view would have an axis for the number
of windows, of which one and several, whole and padded ones are different programs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import is_followed, split_axis

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
        if is_followed(size):
            return True
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


def shorter_side(height: int, width: int, limit: int) -> int:
    """The least of the two sides of a map and of a limit: the side of square windows in it."""
    if torch.jit.is_scripting():
        return min(limit, min(height, width))
    else:  # noqa: RET505
        if is_followed(height):
            return _least_of_tensors(height, width, limit)
        # Python's own would ask which one is less, and tie a program to the answer.
        limit = torch.sym_min(height, limit) if varies(height) else min(height, limit)
        return opaque(torch.sym_min(width, limit) if varies(width) else min(width, limit))


def _least_of_tensors(height: Any, width: Any, limit: int) -> Any:
    return torch.minimum(height, width).clamp(max=limit)


def square_windows(
    height: int, width: int, limit: int, shift: bool
) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Split a map into square windows of one side, as released Swin transformers do.

    Args:
        height: Of the map.
        width: Of the map.
        limit: Greatest side of a window; the shorter side of the map, if that is less.
        shift: Whether windows begin half a window further on, down and to the right. They do not
            where they are as high or as wide as the map.

    Returns:
        The windows along each side, of which the last may reach beyond it, and the rows and columns
        by which they are shifted.
    """
    side = shorter_side(height, width, limit)
    rows, cols = fixed_windows(height, side), fixed_windows(width, side)
    if not shift:
        return rows, cols, 0
    # 1 // n is 1 for one window and 0 for more.
    return rows, cols, limit // 2 * (1 - 1 // rows[0]) * (1 - 1 // cols[0])


def fits(size: int, split: tuple[int, int]) -> bool:
    """Whether the windows are known to end where the side does."""
    count, length = split
    if varies(count) or (varies(length) and count > 1):
        return False
    # A single window whose length varies is as long as the side.
    return varies(length) or (not varies(size) and count * length == size)


def window_places(
    batch: int,
    rows: tuple[int, int],
    cols: tuple[int, int],
    down: int,
    right: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Image, row and column that the tokens of all shifted windows of a batch come from.

    Args:
        batch: Number of maps.
        rows: Number and height of windows along the first side.
        cols: Number and width of windows along the second.
        down: Rows by which the windows are shifted.
        right: Columns, likewise.
        device: Where the numbers are wanted.

    Returns:
        [B * windows, 1], and twice [B * windows, tokens]: rows and columns of whole windows, which
        may reach beyond the map.
    """
    window = torch.arange(batch * rows[0] * cols[0], device=device)[:, None]
    place = torch.arange(rows[1] * cols[1], device=device)
    # Without %, whose divisor has to be a plain number in ONNX.
    line = window // cols[0]
    image = line // rows[0]
    row, col = (line - image * rows[0]) * rows[1] + down, (window - line * cols[0]) * cols[1]
    line = place // cols[1]
    return image, rotated(row + line, rows), rotated(col + place - line * cols[1] + right, cols)


def rotated(index: Tensor, split: tuple[int, int]) -> Tensor:
    """Places along a side of whole windows; those beyond its end begin at its start again."""
    length = split[0] * split[1]
    return torch.where(index < length, index, index - length)


def gather_windows(
    x: Tensor, rows: tuple[int, int], cols: tuple[int, int], down: int, right: int
) -> Tensor:
    """`to_windows` by numbers of tokens, for programs with symbolic sizes."""
    H, W = x.shape[1], x.shape[2]
    image, row, col = window_places(x.shape[0], rows, cols, down, right, x.device)
    beyond = (row >= H) | (col >= W)
    x = x[image, row.clamp(max=H - 1), col.clamp(max=W - 1)]
    while beyond.dim() < x.dim():
        beyond = beyond.unsqueeze(-1)
    return x.masked_fill(beyond, 0)


def gather_map(
    x: Tensor,
    rows: tuple[int, int],
    cols: tuple[int, int],
    size: tuple[int, int, int],
    down: int,
    right: int,
) -> Tensor:
    """`from_windows` by numbers of tokens, for programs with symbolic sizes."""
    image = torch.arange(size[0], device=x.device)[:, None, None]
    row = torch.arange(size[1], device=x.device)[:, None] - down
    col = torch.arange(size[2], device=x.device) - right
    row = torch.where(row >= 0, row, row + rows[0] * rows[1])
    col = torch.where(col >= 0, col, col + cols[0] * cols[1])
    window_row, window_col = row // rows[1], col // cols[1]
    window = (image * rows[0] + window_row) * cols[0] + window_col
    place = (row - window_row * rows[1]) * cols[1] + col - window_col * cols[1]
    return x[window, place]


def to_windows(
    x: Tensor, rows: tuple[int, int], cols: tuple[int, int], down: int = 0, right: int = 0
) -> Tensor:
    """[B, H, W, ...] -> [B * windows, height * width, ...], zeros beyond the map.

    Args:
        x: Map, any strides and any axes after the first three; copied once, or not at all.
        rows: Number and height of windows along the first side.
        cols: Number and width of windows along the second.
        down: Rows by which the windows of the padded map are shifted; those above come last.
        right: Columns, likewise.
    """
    H, W = x.shape[1], x.shape[2]
    if fits(H, rows) and fits(W, cols):
        if is_one(rows[0]) and is_one(cols[0]):
            return x.flatten(1, 2)
    elif known(H, rows) and known(W, cols):
        missing = [0, cols[0] * cols[1] - W, 0, rows[0] * rows[1] - H]
        x = F.pad(x, [0, 0] * (x.dim() - 3) + missing)
    else:
        return gather_windows(x, rows, cols, down, right)
    if down != 0 or right != 0:
        x = x.roll([-down, -right], [1, 2])
    x = x.unflatten(2, [cols[0], cols[1]]).unflatten(1, [rows[0], rows[1]]).transpose(2, 3)
    return x.flatten(3, 4).flatten(0, 2)


def from_windows(
    x: Tensor,
    rows: tuple[int, int],
    cols: tuple[int, int],
    size: tuple[int, int, int],
    down: int = 0,
    right: int = 0,
) -> Tensor:
    """The inverse of `to_windows`: [B * windows, tokens, C] -> [B, H, W, C].

    Args:
        x: Tokens of windows.
        rows: Number and height of windows along the first side.
        cols: Number and width of windows along the second.
        size: Of the map, B, H and W.
        down: Rows by which the windows were shifted.
        right: Columns, likewise.
    """
    B, H, W = size
    whole = fits(H, rows) and fits(W, cols)
    if whole and is_one(rows[0]) and is_one(cols[0]):
        return split_axis(x, 1, [H, W])
    if not whole and not (known(H, rows) and known(W, cols)):
        return gather_map(x, rows, cols, size, down, right)
    x = x.reshape(B, rows[0], cols[0], rows[1], cols[1], x.shape[2]).transpose(2, 3)
    x = x.reshape(B, rows[0] * rows[1], cols[0] * cols[1], x.shape[5])
    if down != 0 or right != 0:
        x = x.roll([down, right], [1, 2])
    return x[:, :H, :W]


def known(size: int, split: tuple[int, int]) -> bool:
    """Whether a side and its windows are plain numbers."""
    return not (varies(size) or varies(split[0]) or varies(split[1]))


def is_one(count: int) -> bool:
    """Whether there is one window for certain."""
    return not varies(count) and count == 1


def window_padding(
    x: Tensor,
    rows: tuple[int, int],
    cols: tuple[int, int],
    key_padding_mask: Tensor | None,
    down: int = 0,
    right: int = 0,
) -> Tensor | None:
    """A mask of the tokens of `to_windows` that are padding, of the map or beyond it.

    Args:
        x: Map, [B, H, W, C].
        rows: Number and height of windows along the first side.
        cols: Number and width of windows along the second.
        key_padding_mask: Padding of the map, [B, H, W] bool.
        down: Rows by which the windows are shifted.
        right: Columns, likewise.

    Returns:
        [B * windows, tokens] bool, None if no token is.
    """
    if key_padding_mask is not None:
        return ~to_windows(~key_padding_mask, rows, cols, down, right)
    B, H, W = x.shape[0], x.shape[1], x.shape[2]
    if fits(H, rows) and fits(W, cols):
        return None
    _, row, col = window_places(B, rows, cols, down, right, x.device)
    return (row >= H) | (col >= W)


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
