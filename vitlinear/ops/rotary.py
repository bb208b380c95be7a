"""Two-dimensional encodings of the positions of tokens on a grid: rotary, and its cosine relative.

Of the D channels of a head, the first half turns with the token's row, the second half with its
column. Each half holds g = D/4 neighbouring pairs (x0, x1), and pair t turns by position * w_t::

    (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin),      w_t = 10000^(-t / (g - 1)), t = 0..g-1

The frequencies include both ends, 1 and 1/10000, as in the released RALA, MALA and NaLaFormer
models. Tables are kept per axis, H x g and W x g, because a table per token would be as large as
the queries themselves for a single high-resolution image.

The rotary encoding of MLLA (MILA) and ViT^3 turns all C = h D channels of the token as one vector,
before the split into heads: g = C/4 and w_t = 10000^(-t / g), which does not include the lower end.
With an even number of heads the first half of them then turns by the row alone and the other half
by the column alone, each head with frequencies of its own. `full_width_rotary_tables` makes them,
and their width, h D / 4 angles an axis instead of D / 4, is what tells the two apart.

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
from .precision import accumulation_dtype

TABLE_DTYPES = (torch.float16, torch.float32, torch.float64)


class RotaryTables(NamedTuple):
    """Cosines and sines of the rotation angles, one table for each axis of the grid.

    Attributes:
        rows: [H, g, 2], cosine and sine of row * w_t.
        cols: [W, g, 2], cosine and sine of column * w_t.

    g is D/4 where every head turns alike, and C/4 where all heads side by side are one vector.
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
        dtype: Of the tables, as `table_dtype` chooses: float32, float64, or float16, which rounds
            the cosines and sines of float32 angles. Half precision would ruin the angles of far
            tokens.
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
    return _tables(height, width, torch.pow(base, steps).reciprocal(), dtype)


def full_width_rotary_tables(
    height: int,
    width: int,
    dim: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    base: float = 10000.0,
) -> RotaryTables:
    """Make the rotary tables of an H x W grid for the whole width of a token.

    They turn all heads side by side as one vector, so angles differ from head to head (MLLA,
    arXiv:2405.16605).

    Args:
        height: Rows of the grid, H.
        width: Columns of the grid, W.
        dim: Channels of a token, C = h D; a multiple of 4.
        device: Where the tables live.
        dtype: As for `rotary_tables`. The numbers are those of float32 arithmetic in any: angles
            and their cosines are rounded to float32, as in the tables that published checkpoints
            were trained with.
        base: Inverse of the limit of the frequencies.

    Returns:
        Tables of shapes [H, C/4, 2] and [W, C/4, 2].

    Raises:
        ValueError: dim is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"2-D rotary encoding needs a width divisible by 4, got {dim}")
    steps = torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4)
    rows, cols = _tables(height, width, torch.pow(base, steps).reciprocal(), torch.float32)
    return RotaryTables(rows.to(dtype), cols.to(dtype))


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
        dtype: As for `rotary_tables`.
        base: Inverse of the limit of the frequencies.

    Returns:
        Tables of shapes [H, D/2, 2] and [W, D/2, 2].

    Raises:
        ValueError: head_dim is odd.
    """
    if head_dim % 2:
        raise ValueError(f"the cosine encoding needs an even head_dim, got {head_dim}")
    has_float64 = device is None or device.type != "mps"
    exact = device if has_float64 else torch.device("cpu")
    steps = torch.arange(head_dim // 2, device=exact, dtype=torch.float64) / (head_dim // 2)
    frequencies = torch.pow(base, -steps)
    if not has_float64:
        frequencies = frequencies.float().to(device)
    return _tables(height, width, frequencies, dtype)


def _tables(height: int, width: int, frequencies: Tensor, dtype: torch.dtype) -> RotaryTables:
    """Cosine and sine of position * frequency along both axes."""
    device, exact = frequencies.device, torch.float32 if dtype == torch.float16 else dtype
    frequencies = frequencies.to(exact)
    rows = torch.arange(height, device=device, dtype=exact)[:, None] * frequencies
    cols = torch.arange(width, device=device, dtype=exact)[:, None] * frequencies
    rows = torch.stack((rows.cos(), rows.sin()), dim=-1)
    cols = torch.stack((cols.cos(), cols.sin()), dim=-1)
    if exact != dtype:  # else exported programs would hold conversions that change nothing
        rows, cols = rows.to(dtype), cols.to(dtype)
    return RotaryTables(rows, cols)


def kernel_table_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which GPU kernels read position tables for tokens of a type.

    A token's entries are as many as its channels. In float32 they would take twice the traffic and
    the shared memory of a bfloat16 query, whose rounding is eight times that of float16.
    """
    return torch.float16 if dtype == torch.bfloat16 else torch.float32


def table_dtype(x: Tensor) -> torch.dtype:
    """The type of position tables for attention to tokens x.

    It is the type that the attention accumulates in, but on a GPU the one that kernels read, which
    would have to convert others in each call. Under autocast the attention gets autocast's type.
    """
    dtype = x.dtype
    if not torch.jit.is_scripting():  # noqa: SIM102 (a script skips what stands in an `if` like this)
        if x.is_cuda and dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
    if x.is_cuda and dtype != torch.float64:
        return kernel_table_dtype(dtype)
    return accumulation_dtype(dtype)


def is_full_width(tables: RotaryTables, heads: int, head_dim: int) -> bool:
    """Whether tables of the rotary encoding turn all heads side by side as one vector."""
    return heads > 1 and tables.rows.shape[1] == heads * head_dim // 4


def token_table(tables: RotaryTables, heads: int = 1) -> Tensor:
    """Spread the axis tables over the grid, with tokens in row-major order.

    Args:
        tables: Of an H x W grid, with g angles an axis.
        heads: Heads that the 2 g angles of a token are for, one after another; 1 where every head
            takes all of them.

    Returns:
        [N, 2 g, 2]; with more than one head [h, N, 2 g / h, 2], contiguous.
    """
    rows, cols = tables
    height, width = rows.shape[0], cols.shape[0]
    if heads == 1:
        grid = (height, width, -1, -1)
        per_token = torch.cat((rows[:, None].expand(grid), cols[None, :].expand(grid)), dim=2)
        return per_token.flatten(0, 1)
    # Of an even number of heads, each turns by one axis, and a single pass writes the table; an odd
    # number leaves a head to both, so groups are half as wide and come together afterwards.
    groups = heads // 2 if heads % 2 == 0 else heads
    by_row = rows.unflatten(1, (groups, -1)).transpose(0, 1)[:, :, None]
    by_col = cols.unflatten(1, (groups, -1)).transpose(0, 1)[:, None]
    both = (axis.expand(-1, height, width, -1, -1) for axis in (by_row, by_col))
    table = torch.cat([*both]).flatten(1, 2)
    if heads % 2:
        table = table.unflatten(0, (heads, 2)).transpose(1, 2).contiguous().flatten(2, 3)
    return table


def rotate(x: Tensor, table: Tensor | None, inverse: bool = False, *, own: bool = False) -> Tensor:
    """Rotate channel pairs of tokens.

    Args:
        x: [..., N, D] in the table's type.
        table: [N, D/2, 2] from `token_table`, or with heads before tokens; None returns x itself.
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
        table: [N, F/2, 2] for ``rotary``, or [h, N, F/2, 2]; [N, F, 2] for ``cosine``; None returns
            x itself.
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
