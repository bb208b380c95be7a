"""Sums over a map whose weights fall off with distance, at a cost that grows with the map."""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import Grid

CHUNK = 16  # places of an axis that meet each other directly


def slopes(num_heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Fall of the logarithm for each step, of each head, [h]: 2^(-8 a / h), a = 1..h (ALiBi)."""
    heads = torch.arange(1, num_heads + 1, device=device, dtype=dtype)
    return torch.exp2(-8 * heads / num_heads)


def two_sided_sums(x: Tensor, falls: Tensor, axis: int) -> Tensor:
    """sum_j exp(-fall |i - j|) x_j along one axis of a map.

    Places of a chunk meet directly; chunks before and after bring their sums, so that an axis of L
    places costs 16 + L / 16 products for each.

    Args:
        x: [B, H, W, h, D, E].
        falls: Of each head, [h], above 0.
        axis: 1 or 2.

    Returns:
        In the shape of x.
    """
    x = x.transpose(1, 2) if axis == 1 else x
    shape, length = x.shape, x.shape[2]
    count = -(-length // CHUNK)
    # [h, chunk, place, all that goes along]
    x = x.permute(3, 2, 0, 1, 4, 5).reshape(shape[3], length, -1)
    x = torch.nn.functional.pad(x, (0, 0, 0, count * CHUNK - length))
    x = x.unflatten(1, (count, CHUNK))
    places = torch.arange(CHUNK, device=x.device)
    falls = falls[:, None, None]

    def kernel(distance: Tensor) -> Tensor:
        return (-falls * distance.abs()).exp()

    out = kernel(places[:, None] - places).unsqueeze(1) @ x
    if count > 1:
        chunks = torch.arange(count, device=x.device)
        for sign in (1, -1):
            to_end = places.flip(0) if sign > 0 else places
            sums = (kernel(to_end[None]).unsqueeze(1) @ x).squeeze(2)
            steps = sign * (chunks[:, None] - chunks) - 1
            reach = kernel(steps * CHUNK).masked_fill(steps < 0, 0)
            from_start = (places if sign > 0 else places.flip(0)) + 1
            out = out + kernel(from_start[:, None]).unsqueeze(1) * (reach @ sums).unsqueeze(2)
    out = out.flatten(1, 2)[:, :length]
    out = out.reshape(shape[3], length, shape[0], shape[1], shape[4], shape[5])
    out = out.permute(2, 3, 1, 0, 4, 5)
    return out.transpose(1, 2) if axis == 1 else out


def distances(grid: Grid, device: torch.device) -> Tensor:
    """|row - row'| + |column - column'| of all pairs of tokens, [N, N]; 0 with those before."""
    prefix = grid.num_prefix_tokens
    row = torch.arange(grid.height, device=device).repeat_interleave(grid.width)
    col = torch.arange(grid.width, device=device).repeat(grid.height)
    out = torch.zeros(grid.length, grid.length, device=device, dtype=torch.long)
    out[prefix:, prefix:] = (row[:, None] - row).abs() + (col[:, None] - col).abs()
    return out
