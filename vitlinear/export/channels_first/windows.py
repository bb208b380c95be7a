"""Softmax attention in windows of maps [B, C, H, W]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear.layers import PaddedWindowAttention, SoftmaxAttention
from vitlinear.layers.windows import fixed_windows

from .attention import Slots
from .layers import Affine, MapSize, NoForm, linear, require, require_nothing


class ChannelsFirstWindowAttention(nn.Module):
    """`PaddedWindowAttention` on a map [B, C, H, W] of one size.

    Queries, keys and values are copied to windows, and what comes out back: four copies, of which
    no program of windows has fewer.
    """

    def __init__(self, attn: nn.Module, norm: nn.LayerNorm, size: MapSize | None) -> None:
        """Take the parameters over; as `ChannelsFirstInLineAttention`."""
        super().__init__()
        require(attn, PaddedWindowAttention)
        assert isinstance(attn, PaddedWindowAttention)
        require(attn.attend, SoftmaxAttention)
        require_nothing(attn.proj_drop)
        if size is None:
            raise NoForm("PaddedWindowAttention at any size")
        side = self.side = attn.window_size
        self.rows, self.cols = (fixed_windows(n, side)[0] for n in (size.height, size.width))
        self.below, self.beyond = self.rows * side - size.height, self.cols * side - size.width
        self.num_heads = attn.attend.num_heads
        # Padding is zeros after what the norm multiplies and adds, which then stays on its own.
        self.affine = Affine(norm) if self.below or self.beyond else None
        slots = Slots(attn.qkv, 3, self.num_heads, None if self.affine else norm)
        self.q, self.k, self.v = (slots.rows(i) for i in range(3))
        self.proj = linear(attn.proj)

    def to_windows(self, x: Tensor) -> Tensor:
        """[B, C, rows K, cols K] -> [B, rows, cols, h, D, K K]."""
        heads = (self.num_heads, x.shape[1] // self.num_heads)
        x = x.reshape(-1, *heads, self.rows, self.side, self.cols, self.side)
        return x.permute(0, 3, 5, 1, 2, 4, 6).flatten(5)

    def from_windows(self, x: Tensor) -> Tensor:
        """[B, rows, cols, h, D, K K] -> [B, C, rows K, cols K]."""
        x = x.unflatten(5, (self.side, self.side)).permute(0, 3, 4, 1, 5, 2, 6)
        return x.reshape(x.shape[0], -1, self.rows * self.side, self.cols * self.side)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; x without what its norm multiplies and adds."""
        height, width = x.shape[2], x.shape[3]
        if self.affine is not None:
            x = F.pad(self.affine(x), (0, self.beyond, 0, self.below))
        q, k, v = (self.to_windows(product(x)) for product in (self.q, self.k, self.v))
        q = q * q.shape[4] ** -0.5
        out = self.from_windows(v @ (q.mT @ k).softmax(-1).mT)
        if self.affine is not None:
            out = out[:, :, :height, :width]
        return self.proj(out)
