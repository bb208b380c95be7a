"""Windows of the map of a grid, for mixers that look at neighbours exactly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlinear.layers.windows import fixed_windows, from_windows, to_windows, window_padding

from .grid import Grid


class GridWindows:
    """Windows of a fixed side, from the first row and column; the last ones may be cut short.

    Cropping the map at the right or below so changes no window that remains.

    Attributes:
        count: Windows, M.
        length: Tokens of a window, T.
    """

    def __init__(self, grid: Grid, side: int) -> None:
        """Cut the map of a grid.

        Args:
            grid: Where the tokens stand.
            side: Rows and columns of a window; a map of fewer has one window of its own.
        """
        self.grid = grid
        self.rows = fixed_windows(grid.height, min(side, grid.height))
        self.cols = fixed_windows(grid.width, min(side, grid.width))
        self.count = self.rows[0] * self.cols[0]
        self.length = self.rows[1] * self.cols[1]

    def cut(self, x: Tensor) -> Tensor:
        """Tokens [B, N, ...] -> those of windows, [B, M, T, ...], zeros beyond the map."""
        _, tokens = self.grid.split(x)
        windows = to_windows(tokens, self.rows, self.cols)
        return windows.reshape(x.shape[0], self.count, self.length, *x.shape[2:])

    def join(self, x: Tensor) -> Tensor:
        """Tokens of windows [B, M, T, ...] -> those of the map, [B, H W, ...]."""
        size = (x.shape[0], self.grid.height, self.grid.width)
        tokens = from_windows(x.flatten(0, 1).flatten(2), self.rows, self.cols, size)
        return tokens.reshape(x.shape[0], size[1] * size[2], *x.shape[3:])

    def present(self, x: Tensor) -> Tensor:
        """Which tokens of the windows exist and are no padding, [B, M, T] bool."""
        _, tokens = self.grid.split(x)
        mask = self.grid.key_padding_mask
        hidden = None if mask is None else self.grid.split(mask)[1]
        beyond = window_padding(tokens[..., 0, 0], self.rows, self.cols, hidden)
        shape = (x.shape[0], self.count, self.length)
        if beyond is None:
            return torch.ones(shape, dtype=torch.bool, device=x.device)
        return ~beyond.reshape(shape)

    def numbers(self, device: torch.device) -> Tensor:
        """The number of the window that each token of the map lies in, [H W]."""
        row = torch.arange(self.grid.height, device=device) // self.rows[1]
        col = torch.arange(self.grid.width, device=device) // self.cols[1]
        return (row[:, None] * self.cols[0] + col).flatten()

    def keys(self, x: Tensor) -> Tensor:
        """For each window the tokens that it looks at: those before the map, and its own.

        [B, N, h, D] -> [B, M, h, P + T, D].
        """
        own = self.cut(x).transpose(2, 3)
        first = x[:, : self.grid.num_prefix_tokens].transpose(1, 2).unsqueeze(1)
        return torch.cat((first.expand(-1, self.count, -1, -1, -1), own), dim=3)

    def seen(self, x: Tensor) -> Tensor:
        """Which of those `keys` a window may look at, [B, M, 1, 1, P + T] bool."""
        own, prefix = self.present(x), self.grid.num_prefix_tokens
        mask = self.grid.key_padding_mask
        if mask is None:
            first = torch.ones_like(own[:, :, :1]).expand(-1, -1, prefix)
        else:
            first = ~mask[:, None, :prefix].expand(-1, self.count, -1)
        return torch.cat((first, own), dim=2)[:, :, None, None]


def hidden_scores(scores: Tensor, seen: Tensor) -> Tensor:
    """Scores [..., keys] with -inf where a key is not seen; a row that sees none keeps all."""
    return scores.masked_fill(~(seen | ~seen.any(-1, keepdim=True)), -torch.inf)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
    """Softmax attention of the tokens before the map to all tokens, [B, P, h, D].

    A row of softmax costs N: there is no reason to approximate a class token's.
    """
    q, k, v = (x.transpose(1, 2) for x in (q[:, : grid.num_prefix_tokens], k, v))
    mask = grid.key_padding_mask
    seen = None if mask is None else (~mask | mask.all(1, keepdim=True))[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def same_window(grid: Grid, side: int, device: torch.device) -> Tensor:
    """Pairs of tokens [N, N] bool that see each other exactly, for definitions.

    Those of one window, and all with the tokens before the map.
    """
    prefix = grid.num_prefix_tokens
    row = torch.arange(grid.height, device=device) // side
    col = torch.arange(grid.width, device=device) // side
    number = (row[:, None] * grid.width + col).flatten()
    pairs = torch.ones(grid.length, grid.length, dtype=torch.bool, device=device)
    pairs[prefix:, prefix:] = number[:, None] == number
    return pairs
