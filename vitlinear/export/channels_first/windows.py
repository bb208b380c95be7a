"""Windows of maps [B, C, H, W], and softmax attention in them.

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


class Windows(nn.Module):
    """Windows of maps of one size, as more maps: [B, C, H, W] and [B * windows, C, h, w].

    Where they reach beyond the map they are zeros, after what the norm before them multiplies and
    adds: that is a step of its own then, and not part of the products that follow.

    Attributes:
        batch: B * windows; None where B varies.
        count: Windows of a map.
        is_padded: Whether they reach beyond the map.
    """

    inside: Tensor
    tokens: Tensor

    def __init__(
        self,
        size: MapSize,
        rows: Side,
        cols: Side,
        norm: nn.Module,
        down: int = 0,
        right: int = 0,
    ) -> None:
        """Note the sizes.

        Args:
            size: Of the maps.
            rows: Number and height of windows along the first side.
            cols: Number and width of windows along the second.
            norm: Before what attends in the windows.
            down: Rows by which windows are shifted; those above come last.
            right: Columns, likewise.

        Raises:
            NoForm: They are padded after a norm of another kind than layer norm.
        """
        super().__init__()
        self.rows, self.cols, self.shift = rows, cols, (down, right)
        self.size = (size.height, size.width)
        self.beyond = (0, cols[0] * cols[1] - size.width, 0, rows[0] * rows[1] - size.height)
        self.count = rows[0] * cols[0]
        self.batch = None if size.batch is None else size.batch * self.count
        self.is_padded = any(self.beyond)
        self.affine: nn.Module = nn.Identity()
        if self.is_padded:
            if not isinstance(norm, nn.LayerNorm):
                raise NoForm(f"windows that reach beyond the map after {type(norm).__name__}")
            self.affine = Affine(norm)
            inside = self.cut(torch.ones(size.batch or 1, 1, *self.size, dtype=size.dtype))
            self.register_buffer("inside", inside)
            self.register_buffer("tokens", inside.sum((2, 3), keepdim=True))

    def norm_of_products(self, norm: nn.Module) -> nn.Module | None:
        """The norm that products after the windows take over; None where zeros stay zeros."""
        return None if self.is_padded else norm

    def of_map(self, x: Tensor) -> Tensor:
        """[B, C, H, W] without what the norm multiplies and adds -> [B * windows, C, h, w]."""
        return self.cut(self.affine(x))

    def cut(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B * windows, C, h, w]."""
        if self.is_padded:
            x = F.pad(x, self.beyond)
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
        if any(self.shift):
            x = x.roll(self.shift, [2, 3])
        return x[:, :, : self.size[0], : self.size[1]] if self.is_padded else x

    def without_padding(self, x: Tensor) -> Tensor:
        """Zeros beyond the map, [B * windows, C, h, w]."""
        return x * self._of_each(self.inside, x) if self.is_padded else x

    def tokens_of(self, x: Tensor) -> Tensor | None:
        """How many tokens of each window are of the map, [B * windows, 1, 1, 1]; None for all."""
        return self._of_each(self.tokens, x) if self.is_padded else None

    def mean(self, x: Tensor) -> Tensor:
        """Over the tokens of each window, which are 0 beyond the map; [B * windows, C, 1, 1]."""
        tokens = self.tokens_of(x)
        if tokens is None:
            return x.mean((2, 3), keepdim=True)
        return x.sum((2, 3), keepdim=True) * (1.0 / tokens)

    def _of_each(self, table: Tensor, x: Tensor) -> Tensor:
        """A table of the windows of one map for those of all, if their number varies."""
        return table if self.batch is not None else table.repeat(x.shape[0] // self.count, 1, 1, 1)


class ChannelsFirstSoftmaxAttention(nn.Module):
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
    """`PaddedWindowAttention` or `ShiftedWindowAttention` on a map [B, C, H, W] of one size."""

    bias: Tensor | None

    def __init__(self, attn: nn.Module, norm: nn.LayerNorm, size: MapSize | None) -> None:
        """Take the parameters over; as `ChannelsFirstInLineAttention`."""
        super().__init__()
        require(attn, PaddedWindowAttention, ShiftedWindowAttention)
        assert isinstance(attn, PaddedWindowAttention | ShiftedWindowAttention)
        require_nothing(attn.proj_drop)
        if size is None:
            raise NoForm(f"{type(attn).__name__} at any size")
        bias = None
        if isinstance(attn, ShiftedWindowAttention):
            require(attn.rel_pos, WindowBias)
            rows, cols, down, right = attn.split(size.height, size.width)
            zero = torch.zeros(1, dtype=size.dtype)
            map_size = (1, size.height, size.width)
            regions = window_regions(map_size, rows, cols, down, right, zero.device)
            bias = attn.biases(zero, regions, rows[1]).detach()
            bias = bias.reshape(-1, *bias.shape[-3:])
        else:
            rows, cols = (fixed_windows(n, attn.window_size) for n in (size.height, size.width))
            down = right = 0
        self.windows = Windows(size, rows, cols, norm, down, right)
        self.register_buffer("bias", bias)
        slots = Slots(attn.qkv, 3, attn.attend.num_heads, self.windows.norm_of_products(norm))
        self.attend = ChannelsFirstSoftmaxAttention(slots, attn.attend)
        self.proj = linear(attn.proj)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; x without what its norm multiplies and adds."""
        out, _ = self.attend(self.windows.of_map(x), self.bias)
        return self.windows.to_map(self.proj(out))
