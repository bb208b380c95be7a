"""Attention in cross-shaped windows: half of the heads in vertical stripes, half in horizontal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module

from ..band import BANDED, LOCAL, Band, band_in_use, use_band
from ..conv.depthwise_conv import DepthwiseConv
from ..conv.dynamic_conv import shifted_sum
from ..layout import split_axis
from ..linear import Linear
from ..padding_rule import SIZES
from ..windows import (
    equal_windows,
    fixed_windows,
    from_windows,
    join_maps,
    to_windows,
    varies,
    window_padding,
)
from .inline_attention import InjectiveAttention, mean_token
from .scriptable import unpack
from .softmax_attention import SoftmaxAttention


@register_notrace_module
class WindowConv(DepthwiseConv):
    """A 3x3 `DepthwiseConv` of windows, whose compiled program serves any number of them."""

    row_rule = LOCAL

    def forward(self, x: Tensor) -> Tensor:
        """[B * windows, height, width, C] -> the same shape."""
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out what is inside
            # PyTorch takes other convolutions from 16 images on: with windows for images, maps on
            # both sides of that would be different programs.
            if torch.compiler.is_dynamo_compiling() and varies(x.shape[0]):
                out = shifted_sum(x, self.weight.reshape(1, -1, 9))
                return out if self.bias is None else out + self.bias
        return self.convolve(x)


class Stripe(nn.Module):
    """Attention and LePE in the windows of a map; subclasses bring the attention."""

    row_rule = BANDED
    uses_source = False  # whether the attention looks at the map that is given besides

    def __init__(
        self,
        dim: int,
        attend: InjectiveAttention | SoftmaxAttention,
        limits: tuple[int, int],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make what branches share.

        Args:
            dim: Channels, C.
            attend: The attention, which `attend_windows` calls.
            limits: Greatest height and width of a window; 0 for that of the map.
            device: Where the parameters live.
            dtype: Type of the parameters.
        """
        super().__init__()
        self.attend = attend
        self.limits = limits
        self.lepe = WindowConv(dim, 3, device=device, dtype=dtype)

    def forward(self, qkv: Tensor, source: Tensor) -> Tensor:
        """Attend.

        Args:
            qkv: Queries, keys and values, [B, H, W, 3, C], any strides.
            source: Map [B, H, W, C'] that the attention may look at besides.

        Returns:
            [B, H, W, C].
        """
        if not torch.jit.is_scripting():
            band = band_in_use()
            if band is not None:
                return self.attend_band(band, qkv, source)
        return self.attend_map(qkv, source, equal_windows(qkv.shape[1], self.limits[0]))

    @torch.jit.ignore
    def row_reach(self, height: int) -> int:
        """Rows around that windows may need; 0 where one is as high as the map."""
        count, length = equal_windows(height, self.limits[0])
        return length - 1 if count > 1 else 0

    @torch.jit.ignore
    def attend_band(self, band: Band, qkv: Tensor, source: Tensor) -> Tensor:
        """`forward` of a band: of windows as high as the map, or of those that it sees whole."""
        band.check_rows(qkv.shape[1])
        count, length = equal_windows(band.height, self.limits[0])
        if count == 1:
            return self.attend_map(qkv, source, (1, qkv.shape[1]))
        wide, qkv = band.around_windows(qkv, length)
        if self.uses_source:
            source = band.around_windows(source, length)[1]
        first, last = wide.whole_windows(length)
        rows = fixed_windows(last - first, length)
        with use_band(None):
            x = self.attend_map(qkv[:, first:last], source[:, first:last], rows)
        return band.within(wide, wide.back_in_band(x, first))

    def attend_map(self, qkv: Tensor, source: Tensor, rows: tuple[int, int]) -> Tensor:
        """`forward` in windows of this number and height."""
        B, H, W, _, C = qkv.shape
        cols = equal_windows(W, self.limits[1])
        mask = window_padding(qkv, rows, cols, None)
        heads = self.attend.num_heads
        qkv = split_axis(to_windows(qkv, rows, cols), 3, [heads, C // heads])
        q, k, v, values = unpack(qkv)
        x = self.attend_windows(q, k, v, values, source, rows, cols, mask)
        x = x + self.lepe(split_axis(values.flatten(2), 1, [rows[1], cols[1]])).flatten(1, 2)
        return from_windows(x, rows, cols, (B, H, W))

    def attend_windows(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        values: Tensor,
        source: Tensor,
        rows: tuple[int, int],
        cols: tuple[int, int],
        mask: Tensor | None,
    ) -> Tensor:
        """The attention of a subclass.

        Args:
            q: Queries of windows, [B * windows, N, h, D]; k and v likewise.
            k: Keys.
            v: Values.
            values: The same again, for what looks at them beside the attention.
            source: As given to `forward`.
            rows: Number and height of windows along the first side.
            cols: Number and width of windows along the second.
            mask: [B * windows, N] bool, True for padding; None without.

        Returns:
            [B * windows, N, C].
        """
        raise NotImplementedError


class InjectiveStripe(Stripe):
    """InLine attention, whose kernels come from the mean of each window of the source."""

    uses_source = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        limits: tuple[int, int],
        backend: str,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        attend = InjectiveAttention(dim, num_heads, 0, backend, device=device, dtype=dtype)
        super().__init__(dim, attend, limits, device, dtype)

    def attend_windows(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        values: Tensor,
        source: Tensor,
        rows: tuple[int, int],
        cols: tuple[int, int],
        mask: Tensor | None,
    ) -> Tensor:
        """See `Stripe`."""
        mean = mean_token(to_windows(source, rows, cols), mask)
        return self.attend(q, k, v, values, mean, rows[1], cols[1], mask)


class SoftmaxStripe(Stripe):
    """Softmax attention; the source is not used."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        limits: tuple[int, int],
        backend: str,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        attend = SoftmaxAttention(num_heads, dim // num_heads, backend)
        super().__init__(dim, attend, limits, device, dtype)

    @torch.jit.ignore
    def row_gather(self, height: int) -> int:
        """Channels of keys and values that a band needs of all rows."""
        whole = equal_windows(height, self.limits[0])[0] == 1
        return 2 * self.lepe.out_channels if whole else 0

    def attend_windows(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        values: Tensor,
        source: Tensor,
        rows: tuple[int, int],
        cols: tuple[int, int],
        mask: Tensor | None,
    ) -> Tensor:
        """See `Stripe`."""
        return self.attend(q, k, v, None if mask is None else ~mask[:, None, None])


# One step to torch.fx, as `GatedAttention`.
@register_notrace_module
class CrossShapedAttention(nn.Module):
    """proj(branches of q, k and v from one projection), as the released InLine-CSwin has them.

    ``inline``: one branch over all channels, in windows of at most `split` x `split`.
    ``softmax``: two branches with half of the channels and heads each, in stripes as high as the
    map and at most `split` wide, and in stripes as wide as the map and at most `split` high. With
    a split of 0 one branch over all channels and the whole map. Source: CSWin transformer
    (arXiv:2107.00652) and arXiv:2412.06590.
    """

    padding_rule = SIZES
    row_rule = LOCAL

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attn_type: str,
        split: int,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the attention.

        Args:
            dim: Channels, C.
            num_heads: Heads, each of C / num_heads channels.
            attn_type: ``inline`` or ``softmax``.
            split: Greatest width of stripes, or side of windows; 0 for the whole map.
            proj_drop: Dropout rate of the output.
            backend: One of `vitlinear.ops.BACKENDS`, for linear attention; softmax runs on SDPA.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: dim does not divide into heads and branches, or a name is unknown.
        """
        super().__init__()
        if attn_type not in ("inline", "softmax"):
            raise ValueError(f"unknown attention {attn_type!r}; choose from: inline, softmax")
        branches = 2 if attn_type == "softmax" and split > 0 else 1
        if num_heads < 1 or num_heads % branches or dim % num_heads:
            parts = f"{num_heads} heads" + (" in two branches" if branches == 2 else "")
            raise ValueError(f"dim {dim} does not divide into {parts}")
        stripe = InjectiveStripe if attn_type == "inline" else SoftmaxStripe
        limits = ((0, split), (split, 0)) if branches == 2 else ((split, split),)
        self.qkv = Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.branches = nn.ModuleList(
            stripe(dim // branches, num_heads // branches, limit, backend, device, dtype)
            for limit in limits
        )
        self.proj = Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        source: Tensor,
        valid_sizes: list[tuple[int, int]] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: [B, H, W, C].
            source: Map that InLine branches take the mean for their kernels from, like x.
            valid_sizes: Height and width of the part of each map that is no padding: each is
                attended to like a map of its own, with windows of its own, and padding gets 0.

        Returns:
            [B, H, W, C].
        """
        if valid_sizes is None:
            return self.attend_map(x, source)
        maps: list[Tensor] = []
        for i, (height, width) in enumerate(valid_sizes):
            part, around = x[i : i + 1, :height, :width], source[i : i + 1, :height, :width]
            maps.append(self.attend_map(part, around))
        return join_maps(maps, x.shape[1], x.shape[2])

    def attend_map(self, x: Tensor, source: Tensor) -> Tensor:
        """[B, H, W, C] twice -> [B, H, W, C]."""
        B, H, W, C = x.shape
        count = len(self.branches)
        parts = self.qkv(x).reshape(B, H, W, 3, count, C // count)
        outs: list[Tensor] = []
        for i, branch in enumerate(self.branches):
            outs.append(branch(parts[:, :, :, :, i], source))
        return self.proj_drop(self.proj(torch.cat(outs, -1)))
