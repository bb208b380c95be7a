"""Softmax attention in windows of maps [B, C, H, W].

A map is copied to windows before anything is projected, and back after: two copies, where queries,
keys, values and output would be four.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear.layers import PaddedWindowAttention, SoftmaxAttention
from vitlinear.layers.attention.shifted_window_attention import (
    ShiftedWindowAttention,
    WindowBias,
    window_regions,
)
from vitlinear.layers.windows import fixed_windows

from .attention import Slots, heads_of
from .layers import Affine, MapSize, NoForm, linear, require, require_nothing

Side = tuple[int, int]


class Windows:
    """Windows of maps of one size, as more maps: [B, C, H, W] and [B * windows, C, h, w].

    Attributes:
        batch: B * windows; None where B varies.
        count: Windows of a map.
    """

    def __init__(self, size: MapSize, rows: Side, cols: Side, down: int = 0, right: int = 0):
        """Note the sizes.

        Args:
            size: Of the maps.
            rows: Number and height of windows along the first side.
            cols: Number and width of windows along the second.
            down: Rows by which windows are shifted; those above come last.
            right: Columns, likewise.

        Raises:
            NoForm: They reach beyond the map.
        """
        if (rows[0] * rows[1], cols[0] * cols[1]) != (size.height, size.width):
            raise NoForm("windows that reach beyond the map")
        self.rows, self.cols, self.shift = rows, cols, (down, right)
        self.count = rows[0] * cols[0]
        self.batch = None if size.batch is None else size.batch * self.count

    def of_map(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B * windows, C, h, w]."""
        if any(self.shift):
            x = x.roll([-n for n in self.shift], [2, 3])
        if self.count == 1:
            return x
        x = x.unflatten(3, self.cols).unflatten(2, self.rows)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)

    def to_map(self, x: Tensor) -> Tensor:
        """[B * windows, C, h, w] -> [B, C, H, W]."""
        if self.count > 1:
            x = x.unflatten(0, (-1, self.rows[0], self.cols[0]))
            x = x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        return x.roll(self.shift, [2, 3]) if any(self.shift) else x


class SoftmaxHeads(nn.Module):
    """Products with q, k and v, and softmax attention of them, on a map [B, C, H, W]."""

    def __init__(self, slots: Slots, attend: nn.Module) -> None:
        """Take the parameters over.

        Args:
            slots: What gives q, k and v.
            attend: The attention.
        """
        super().__init__()
        require(attend, SoftmaxAttention)
        assert isinstance(attend, SoftmaxAttention)
        self.num_heads = attend.num_heads
        self.q, self.k, self.v = (slots.rows(i) for i in range(3))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            x: [B, C, H, W].
            bias: Added to logits, [windows or 1, h, N, N]; B is a multiple of windows.

        Returns:
            What comes out, and the values, [B, C', H, W] each.
        """
        values = self.v(x)
        q, k, v = (heads_of(y, self.num_heads) for y in (self.q(x), self.k(x), values))
        logits = (q * q.shape[2] ** -0.5).mT @ k
        if bias is not None and bias.shape[0] > 1:
            logits = (logits.unflatten(0, (-1, bias.shape[0])) + bias).flatten(0, 1)
        elif bias is not None:
            logits = logits + bias
        return (v @ logits.softmax(-1).mT).reshape(values.shape), values


class ChannelsFirstWindowAttention(nn.Module):
    """`PaddedWindowAttention` on a map [B, C, H, W] of one size."""

    def __init__(self, attn: nn.Module, norm: nn.LayerNorm, size: MapSize | None) -> None:
        """Take the parameters over; as `ChannelsFirstInLineAttention`."""
        super().__init__()
        require(attn, PaddedWindowAttention)
        assert isinstance(attn, PaddedWindowAttention)
        require_nothing(attn.proj_drop)
        if size is None:
            raise NoForm("PaddedWindowAttention at any size")
        rows, cols = (fixed_windows(n, attn.window_size) for n in (size.height, size.width))
        whole = size._replace(height=rows[0] * rows[1], width=cols[0] * cols[1])
        self.beyond = (0, whole.width - size.width, 0, whole.height - size.height)
        self.windows = Windows(whole, rows, cols)
        # Padding is zeros after what the norm multiplies and adds, which then stays on its own.
        self.affine = Affine(norm) if any(self.beyond) else None
        slots = Slots(attn.qkv, 3, attn.attend.num_heads, None if self.affine else norm)
        self.attend = SoftmaxHeads(slots, attn.attend)
        self.proj = linear(attn.proj)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; x without what its norm multiplies and adds."""
        height, width = x.shape[2], x.shape[3]
        if self.affine is not None:
            x = F.pad(self.affine(x), self.beyond)
        out, _ = self.attend(self.windows.of_map(x))
        out = self.windows.to_map(self.proj(out))
        return out if self.affine is None else out[:, :, :height, :width]


class ChannelsFirstShiftedAttention(nn.Module):
    """`ShiftedWindowAttention` on a map [B, C, H, W] of one size, which whole windows cover."""

    def __init__(self, attn: nn.Module, norm: nn.LayerNorm, size: MapSize | None) -> None:
        """Take the parameters over; as `ChannelsFirstInLineAttention`."""
        super().__init__()
        require(attn, ShiftedWindowAttention)
        assert isinstance(attn, ShiftedWindowAttention)
        require(attn.rel_pos, WindowBias)
        require_nothing(attn.proj_drop)
        if size is None:
            raise NoForm("ShiftedWindowAttention at any size")
        rows, cols, down, right = attn.split(size.height, size.width)
        self.windows = Windows(size, rows, cols, down, right)
        slots = Slots(attn.qkv, 3, attn.attend.num_heads, norm)
        self.attend = SoftmaxHeads(slots, attn.attend)
        logits = torch.zeros(1, dtype=size.dtype)
        device = logits.device
        regions = window_regions((1, size.height, size.width), rows, cols, down, right, device)
        if regions is not None:
            hidden = regions[:, None, :, None] != regions[:, None, None, :]
            logits = torch.zeros(hidden.shape, dtype=size.dtype).masked_fill(hidden, -torch.inf)
        bias = attn.rel_pos(logits, None, rows[1]).detach().to(size.dtype)
        self.register_buffer("bias", bias.reshape(-1, *bias.shape[-3:]))
        self.proj = linear(attn.proj)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; x without what its norm multiplies and adds."""
        out, _ = self.attend(self.windows.of_map(x), self.bias)
        return self.windows.to_map(self.proj(out))
