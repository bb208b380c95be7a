"""Two-dimensional encodings of the positions of tokens on a grid: rotary, and its cosine relative.

Of the D channels of a head, the first half turns with the token's row, the second half with its
column. Each half holds g = D/4 neighbouring pairs (x0, x1), and pair t turns by position * w_t::

    (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin),      w_t = 10000^(-t / (g - 1)), t = 0..g-1

The frequencies include both ends, 1 and 1/10000, as in the released RALA, MALA and NaLaFormer
models. Tables are kept per axis, H x g and W x g, because a table per token would be as large as
the queries themselves for a single high-resolution image.

LightNet's multi-dimensional LRPE (arXiv:2405.21022) puts [x cos; x sin] for x instead, with one
angle for each channel: e = D/2 of them for each axis, position * 10000^(-t / e), t = 0..e-1. The
product of two features so encoded is sum_c q_c k_c cos(difference of the angles). Its tables are
those of `lrpe_tables`, of the same form with e in the place of g.

No `from __future__ import annotations` here: inside of another tuple, TorchScript cannot read the
types of `RotaryTables` as strings.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu


class RotaryTables(NamedTuple):
    """Cosines and sines of the rotation angles, one table for each axis of the grid.

    Attributes:
        rows: [H, g, 2], cosine and sine of row * w_t.
        cols: [W, g, 2], cosine and sine of column * w_t.
    """

    rows: Tensor
    cols: Tensor


def rotary_tables(
    height: int,
    width: int,
    head_dim: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    base: float = 10000.0,
) -> RotaryTables:
    """Make the rotary tables of an H x W grid.

    Args:
        height: Rows of the grid, H.
        width: Columns of the grid, W.
        head_dim: Channels of a head, D; a multiple of 4.
        device: Where the tables live.
        dtype: float32 or float64. Half precision would ruin the angles of far tokens, so give the
            accumulation type of the attention, not the type of its inputs.
        base: Inverse of the lowest frequency.

    Returns:
        Tables of shapes [H, D/4, 2] and [W, D/4, 2].

    Raises:
        ValueError: head_dim is no multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"2-D rotary encoding needs a head_dim divisible by 4, got {head_dim}")
    # Rounded to float32 whatever the table's type: that is what published checkpoints hold, and
    # at position 100 a differently rounded frequency already shows in the eighth digit.
    steps = torch.linspace(0.0, 1.0, head_dim // 4, device=device, dtype=torch.float32)
    return _tables(height, width, torch.pow(base, steps).reciprocal().to(dtype))


def lrpe_tables(
    height: int,
    width: int,
    head_dim: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    base: float = 10000.0,
) -> RotaryTables:
    """Make the tables of the cosine encoding (MD-LRPE) of an H x W grid.

    Args:
        height: Rows of the grid, H.
        width: Columns of the grid, W.
        head_dim: Channels of a head, D; even.
        device: Where the tables live.
        dtype: float32 or float64, as for `rotary_tables`.
        base: Inverse of the limit of the frequencies.

    Returns:
        Tables of shapes [H, D/2, 2] and [W, D/2, 2].

    Raises:
        ValueError: head_dim is odd.
    """
    if head_dim % 2:
        raise ValueError(f"the cosine encoding needs an even head_dim, got {head_dim}")
    steps = torch.arange(head_dim // 2, device=device, dtype=torch.float64) / (head_dim // 2)
    return _tables(height, width, torch.pow(base, -steps).to(dtype))


def _tables(height: int, width: int, frequencies: Tensor) -> RotaryTables:
    """Cosine and sine of position * frequency along both axes."""
    device, dtype = frequencies.device, frequencies.dtype
    rows = torch.arange(height, device=device, dtype=dtype)[:, None] * frequencies
    cols = torch.arange(width, device=device, dtype=dtype)[:, None] * frequencies
    return RotaryTables(
        torch.stack((rows.cos(), rows.sin()), dim=-1), torch.stack((cols.cos(), cols.sin()), dim=-1)
    )


def token_table(tables: RotaryTables) -> Tensor:
    """Spread the axis tables over the grid: [N, 2 g, 2] with tokens in row-major order."""
    rows, cols = tables
    grid = (rows.shape[0], cols.shape[0], -1, -1)
    per_token = torch.cat((rows[:, None].expand(grid), cols[None, :].expand(grid)), dim=2)
    return per_token.flatten(0, 1)


def rotate(x: Tensor, table: Tensor | None, inverse: bool = False, *, own: bool = False) -> Tensor:
    """Rotate channel pairs of tokens.

    Args:
        x: [..., N, D] in the table's type.
        table: [N, D/2, 2] from `token_table`; None returns x itself.
        inverse: Turn backwards, which is also the transpose of the rotation.
        own: x may be written to, where nothing is kept for a gradient.

    Returns:
        [..., N, D].
    """
    return x if table is None else cpu.rotate_pairs(x, table, inverse, own=own)


def encode(
    x: Tensor,
    table: Tensor | None,
    positions: str,
    inverse: bool = False,
    *,
    own: bool = False,
) -> Tensor:
    """Apply the encoding R of a mechanism.

    Args:
        x: Features, [..., N, F] in the table's dtype; [..., N, 2 F] for the inverse of ``cosine``.
        table: [N, F/2, 2] for ``rotary``, [N, F, 2] for ``cosine``; None returns x itself.
        positions: ``'rotary'`` or ``'cosine'``.
        inverse: Apply the transpose.
        own: As for `rotate`; ``cosine`` has no use for it.

    Returns:
        [..., N, F], or [..., N, 2 F] from ``cosine``, with cosine and sine of a channel side by
        side: their order does not matter to a product of two encoded features.
    """
    if table is None or positions == "rotary":
        return rotate(x, table, inverse, own=own)
    if inverse:
        return (x.unflatten(-1, (-1, 2)) * table).sum(-1)
    return (x.unsqueeze(-1) * table).flatten(-2)
