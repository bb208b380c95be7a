"""InLine attention: injective linear attention and a local term whose kernel the tokens decide."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.ops import accumulation_dtype
from vitlinear.ops.backend import check_backend

from ..band import BANDED, Band, band_in_use, use_band
from ..conv.dynamic_conv import DynamicConv
from ..heads import split_heads
from ..layout import split_axis
from ..linear import Linear
from ..padding_rule import MASK, SIZES
from ..windows import (
    equal_windows,
    fixed_windows,
    from_windows,
    join_maps,
    to_windows,
    window_padding,
)
from .band_attention import merge_sums
from .scriptable import scriptable_attention, unpack


class InjectiveAttention(nn.Module):
    """InLine attention between its projections: Attention(q, k, v) + DynamicConv(v).

    The local term sees the spatial tokens alone; tokens before them, such as a class token, take
    part in the attention only. Source: arXiv:2412.06590, equations 6 and 7, and its released code.
    """

    attn_type = "inline"
    row_rule = BANDED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_prefix_tokens: int = 0,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the attention.

        Args:
            dim: Channels, C.
            num_heads: Heads, each of C / num_heads channels.
            num_prefix_tokens: Tokens that stand before those of the map.
            backend: One of `vitlinear.ops.BACKENDS`.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: dim does not divide into heads, or backend is unknown.
        """
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = split_heads(dim, num_heads)
        self.num_prefix_tokens = num_prefix_tokens
        self.backend = check_backend(backend)
        self.local = DynamicConv(dim, num_heads, device=device, dtype=dtype)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        values: Tensor,
        mean: Tensor,
        height: int,
        width: int,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: Queries, [B, N, h, D], any strides; N = num_prefix_tokens + height * width.
            k: Keys, like q.
            v: Values, like q.
            values: The same again, for the local term.
            mean: Mean of the tokens that the kernels come from, [B, C].
            height: Of the map.
            width: Of the map.
            key_padding_mask: [B, N] bool, True for padding: equal to leaving these tokens out.

        Returns:
            [B, N, C].
        """
        if key_padding_mask is not None:
            values = values.masked_fill(key_padding_mask[:, :, None, None], 0)
        prefix = self.num_prefix_tokens
        values = split_axis(values[:, prefix:].flatten(2), 1, [height, width])
        local = self.local(values, mean).flatten(1, 2)
        if prefix > 0:
            local = F.pad(local, [0, 0, prefix, 0])
        lepe = split_axis(local, 2, [self.num_heads, self.head_dim])
        mask = key_padding_mask
        out = scriptable_attention(
            q, k, v, "inline", key_padding_mask=mask, lepe=lepe, backend=self.backend
        )
        return out.flatten(2)


def mean_token(x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
    """Mean over the tokens of [B, N, C] that are no padding, [B, C].

    In a band, over those of all bands; NaN where it is not known yet, so that nothing uses it.
    """
    if not torch.jit.is_scripting():
        band = band_in_use()
        if band is not None:
            return _mean_of_bands(band, x, key_padding_mask)
    if key_padding_mask is None:
        return x.mean(1)
    # A mean times a ratio near one: in half precision the sum itself might not be finite.
    padding = key_padding_mask.unsqueeze(-1)
    share = (~padding).to(accumulation_dtype(x.dtype)).mean(1).clamp(min=1.0 / x.shape[1])
    return (x.masked_fill(padding, 0).mean(1) / share).to(x.dtype)


def _mean_of_bands(band: Band, x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """`mean_token` of the tokens of all bands."""
    own = band.own_tokens(x).to(accumulation_dtype(x.dtype))
    count = own.new_full((x.shape[0], 1), own.shape[1])
    if key_padding_mask is not None:
        padding = band.own_tokens(key_padding_mask)
        own = own.masked_fill(padding.unsqueeze(-1), 0)
        count = (~padding).sum(1, keepdim=True).to(own.dtype)
    total, count = band.merge((own.sum(1), count), merge_sums, later=True)
    return (total / count.clamp(min=1)).to(x.dtype)


class _ProjectedAttention(nn.Module):
    """proj(InjectiveAttention(q, k, v)), q, k and v from one projection."""

    padding_rule = MASK

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_prefix_tokens: int = 0,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the attention.

        Args:
            dim: Channels, C.
            num_heads: Heads, each of C / num_heads channels.
            num_prefix_tokens: Tokens that stand before those of the map.
            proj_drop: Dropout rate of the output.
            backend: One of `vitlinear.ops.BACKENDS`.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: dim does not divide into heads, or backend is unknown.
        """
        super().__init__()
        self.attend = InjectiveAttention(
            dim, num_heads, num_prefix_tokens, backend, device=device, dtype=dtype
        )
        self.qkv = Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.proj = Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def attend_tokens(
        self, x: Tensor, height: int, width: int, key_padding_mask: Tensor | None
    ) -> Tensor:
        """[B, num_prefix_tokens + height * width, C] -> the same shape."""
        heads = [3, self.attend.num_heads, self.attend.head_dim]
        q, k, v, values = unpack(split_axis(self.qkv(x), 2, heads))
        mean = mean_token(x, key_padding_mask)
        x = self.attend(q, k, v, values, mean, height, width, key_padding_mask)
        return self.proj_drop(self.proj(x))


# One step to torch.fx, as `GatedAttention`.
@register_notrace_module
class InLineTokenAttention(_ProjectedAttention):
    """InLine attention on a row of tokens; arguments as `InjectiveAttention`, and proj_drop."""

    row_rule = BANDED

    def forward(
        self, x: Tensor, height: int, width: int, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attend over all tokens.

        Args:
            x: [B, num_prefix_tokens + height * width, C].
            height: Of the map.
            width: Of the map.
            key_padding_mask: [B, N] bool, True for padding: equal to leaving these tokens out.

        Returns:
            The same shape.
        """
        return self.attend_tokens(x, height, width, key_padding_mask)


@register_notrace_module
class InLineAttention(_ProjectedAttention):
    """InLine attention on a map, in windows with a state, a mean token and kernels each."""

    row_rule = BANDED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 0,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the attention.

        Args:
            dim: Channels, C.
            num_heads: Heads, each of C / num_heads channels.
            window_size: Greatest side of a window. Larger maps are split into equal windows,
                smaller ones are one window; 0 always makes one window.
            proj_drop: Dropout rate of the output.
            backend: One of `vitlinear.ops.BACKENDS`.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: dim does not divide into heads, or backend is unknown.
        """
        super().__init__(dim, num_heads, 0, proj_drop, backend, device=device, dtype=dtype)
        self.window_size = window_size
        if window_size > 0:
            self.padding_rule = SIZES

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        valid_sizes: list[tuple[int, int]] | None = None,
    ) -> Tensor:
        """Attend inside every window.

        Args:
            x: [B, H, W, C].
            key_padding_mask: [B, H, W] bool, True for padding: equal to leaving these tokens out
                of the windows, which remain those of the whole map.
            valid_sizes: Height and width of the part of each map that is no padding: each is
                attended to like a map of its own, with windows of its own, and padding gets 0.

        Returns:
            The same shape.
        """
        if valid_sizes is None:
            return self.attend_map(x, key_padding_mask)
        maps: list[Tensor] = []
        for i, (height, width) in enumerate(valid_sizes):
            maps.append(self.attend_map(x[i : i + 1, :height, :width], None))
        return join_maps(maps, x.shape[1], x.shape[2])

    def attend_map(self, x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        if not torch.jit.is_scripting():
            band = band_in_use()
            if band is not None and self.row_reach(band.height) > 0:
                return self.attend_whole_windows(band, x)
        B, H, W = x.shape[0], x.shape[1], x.shape[2]
        rows, cols = equal_windows(H, self.window_size), equal_windows(W, self.window_size)
        mask = window_padding(x, rows, cols, key_padding_mask)
        x = self.attend_tokens(to_windows(x, rows, cols), rows[1], cols[1], mask)
        return from_windows(x, rows, cols, (B, H, W))

    @torch.jit.ignore
    def row_reach(self, height: int) -> int:
        """Rows around that windows may need; 0 where one is as high as the map."""
        count, length = equal_windows(height, self.window_size)
        return length - 1 if count > 1 else 0

    @torch.jit.ignore
    def attend_whole_windows(self, band: Band, x: Tensor) -> Tensor:
        """`attend_map` of the windows that a band sees whole."""
        band.check_rows(x.shape[1])
        length = equal_windows(band.height, self.window_size)[1]
        wide, x = band.around_windows(x, length)
        first, last = wide.whole_windows(length)
        x = x[:, first:last]
        B, H, W = x.shape[0], x.shape[1], x.shape[2]
        rows, cols = fixed_windows(H, length), equal_windows(W, self.window_size)
        mask = window_padding(x, rows, cols, None)
        with use_band(None):
            x = self.attend_tokens(to_windows(x, rows, cols), length, cols[1], mask)
        return band.within(wide, wide.back_in_band(from_windows(x, rows, cols, (B, H, W)), first))
