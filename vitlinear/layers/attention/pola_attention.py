"""PolaFormer's attention: products of equal and of unequal signs, each with values of its own."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.ops import accumulation_dtype
from vitlinear.ops.backend import check_backend

from ..band import BANDED, Band, band_in_use, use_band
from ..conv.head_shared_conv import HeadSharedConv
from ..fold import is_product, shared_copy
from ..heads import split_heads
from ..layout import split_axis
from ..linear import Linear
from ..padding_rule import SIZES
from ..plain import is_plain
from ..positions.learned import resized_positions
from ..recompute import recomputing
from ..windows import (
    fixed_windows,
    from_windows,
    join_maps,
    square_windows,
    to_windows,
    window_padding,
)
from .scriptable import scriptable_attention, unpack


def divisor(scale: Tensor) -> Tensor:
    """s = softplus(scale), float32 or float64, of which the features and gradients stay finite."""
    scale = scale.to(accumulation_dtype(scale.dtype))
    least = 1e-115 if scale.dtype == torch.float64 else 3e-15
    return F.softplus(scale).clamp(min=least)


def divided(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """x / scale + shift in the type of x, or the largest number there is in float16.

    Half types are rounded once, at the end: the result is raised to a power.
    """
    y = x / scale
    if shift is not None:
        y = y + shift
    if x.dtype == torch.float16:
        y = y.clamp(min=-65504.0, max=65504.0)
    return y.to(x.dtype)


class PolarityAttention(nn.Module):
    """(Attention(q, k, v) + dw5(v)) * gate between the projections; learns powers and kernels.

    Features are [relu(x)^p ; relu(-x)^p] with a power p for each channel. The first half of the
    values of a head is mixed by the features of q, the second by those of -q. The depthwise
    convolution has the same kernels for all heads. Source: PolaFormer (arXiv:2501.15061) and its
    released code.
    """

    attn_type = "pola"
    row_rule = BANDED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the attention.

        Args:
            dim: Channels, C.
            num_heads: Heads, each of C / num_heads channels, an even number.
            backend: One of `vitlinear.ops.BACKENDS`.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: dim does not divide into heads of a multiple of 2 channels, or the backend
                is unknown.
        """
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = split_heads(dim, num_heads, multiple=2)
        self.backend = check_backend(backend)
        # The shape of the released one: parameters of more than one axis are decayed.
        self.power = nn.Parameter(
            torch.empty(1, num_heads, 1, self.head_dim, device=device, dtype=dtype)
        )
        self.lepe: nn.Module = HeadSharedConv(
            self.head_dim, num_heads, 5, device=device, dtype=dtype
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Powers of 3; the convolution has its own initial values."""
        nn.init.zeros_(self.power)

    def powers(self) -> Tensor:
        """p = 1 + 4 sigmoid(power), [h, D], float32 or float64; the released alpha is 4."""
        power = self.power.to(accumulation_dtype(self.power.dtype))
        return (1 + 4 * power.sigmoid()).reshape(self.num_heads, self.head_dim)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        height: int,
        width: int,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: Queries, divided by the scale, [B, N, h, D] with N = height * width, any strides.
            k: Keys with positions, divided by the scale, like q.
            v: Values, like q.
            gate: Multiplies the output, like q.
            height: Of the map.
            width: Of the map.
            key_padding_mask: [B, N] bool, True for padding: equal to leaving these tokens out.

        Returns:
            [B, N, C].
        """
        values = v
        if key_padding_mask is not None:
            values = v.masked_fill(key_padding_mask[:, :, None, None], 0)
        lepe = self.lepe(split_axis(values.flatten(2), 1, [height, width])).flatten(1, 2)
        lepe = split_axis(lepe, 2, [self.num_heads, self.head_dim])
        mask = key_padding_mask
        out = scriptable_attention(
            q, k, v, "pola", key_padding_mask=mask, lepe=lepe, gate=gate,
            backend=self.backend, powers=self.powers(),
        )  # fmt: skip
        return out.flatten(2)


# One step to torch.fx, as `GatedAttention`.
@register_notrace_module
class PolaAttention(nn.Module):
    """proj((Attention(q / s, (k + E) / s, v) + dw5(v)) * g) on a map, or in windows of it.

    q, k, v and g come from one projection of the tokens; s = softplus(scale) for each channel, and
    E is a learned position for each token of a map of one size, which is resized to others.

    Windows are those of the released Swin host: square, and of the shorter side of the map where
    that is less than their greatest side. Shifted ones mix what the cyclic shift brings together
    from both ends of the map, for there the released code leaves the mask of the shift aside.
    """

    padding_rule = SIZES
    row_rule = BANDED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: tuple[int, int],
        window_size: int = 0,
        shift: bool = False,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the attention.

        Args:
            dim: Channels, C.
            num_heads: Heads, each of C / num_heads channels, an even number.
            grid_size: Rows and columns of E, those of the map or window at the trained size.
            window_size: Greatest side of a window; 0 for no windows.
            shift: Whether windows begin half a window further on.
            proj_drop: Dropout rate of the output.
            backend: One of `vitlinear.ops.BACKENDS`.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: dim does not divide into heads of a multiple of 2 channels, or the backend
                is unknown.
        """
        super().__init__()
        self.grid_size = grid_size
        self.window_size = window_size
        self.shift = shift
        self.qkvg = Linear(dim, 4 * dim, device=device, dtype=dtype)
        # The shape of the released one: parameters of more than one axis are decayed.
        self.scale = nn.Parameter(torch.empty(1, 1, dim, device=device, dtype=dtype))
        self.positional_encoding = nn.Parameter(
            torch.empty(1, grid_size[0] * grid_size[1], dim, device=device, dtype=dtype)
        )
        self.attend = PolarityAttention(dim, num_heads, backend, device=device, dtype=dtype)
        self.proj = Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero positions and s = ln 2; the projections have their own initial values."""
        nn.init.zeros_(self.scale)
        nn.init.zeros_(self.positional_encoding)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        valid_sizes: list[tuple[int, int]] | None = None,
    ) -> Tensor:
        """Attend over the map, or inside every window.

        Args:
            x: [B, H, W, C].
            key_padding_mask: [B, H, W] bool, True for padding: equal to leaving these tokens out
                of the map, whose windows and positions stay.
            valid_sizes: Height and width of the part of each map that is no padding: each is
                attended to like a map of its own, with windows and positions of its own, and
                padding gets 0.

        Returns:
            The same shape.
        """
        if valid_sizes is None:
            return self.attend_map(x, key_padding_mask)
        if self.window_size == 0:
            return self.attend_valid(x, valid_sizes)
        maps: list[Tensor] = []
        for i, (height, width) in enumerate(valid_sizes):
            maps.append(self.attend_map(x[i : i + 1, :height, :width], None))
        return join_maps(maps, x.shape[1], x.shape[2])

    def attend_map(self, x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        B, H, W = x.shape[0], x.shape[1], x.shape[2]
        mask = key_padding_mask
        if not torch.jit.is_scripting():
            band = band_in_use()
            if band is not None:
                return self.attend_band(band, x)
        if self.window_size == 0:
            if mask is not None:
                mask = mask.flatten(1)
            x = self.attend_tokens(x.flatten(1, 2), self.positions(H, W), H, W, mask)
            return split_axis(x, 1, [H, W])
        rows, cols, shift = square_windows(H, W, self.window_size, self.shift)
        mask = window_padding(x, rows, cols, mask, shift, shift)
        x = to_windows(x, rows, cols, shift, shift)
        height, width = rows[1], cols[1]
        x = self.attend_tokens(x, self.positions(height, width), height, width, mask)
        return from_windows(x, rows, cols, (B, H, W), shift, shift)

    @torch.jit.ignore
    def row_reach(self, height: int) -> int:
        """Rows around that windows may need."""
        return max(self.window_size - 1, 0)

    @torch.jit.ignore
    def attend_band(self, band: Band, x: Tensor) -> Tensor:
        """`attend_map` of a band."""
        band.check_rows(x.shape[1])
        H, W = x.shape[1], x.shape[2]
        if self.window_size > 0:
            return self.attend_whole_windows(band, x)
        positions = band.once(self, lambda: self.positions(band.height, W))
        positions = positions[:, band.start : band.stop]
        return split_axis(self.attend_tokens(x.flatten(1, 2), positions, H, W, None), 1, [H, W])

    @torch.jit.ignore
    def attend_whole_windows(self, band: Band, x: Tensor) -> Tensor:
        """`attend_map` of the windows that a band sees whole.

        The cyclic shift makes one row of windows of both ends of the map. All bands get their rows.
        """
        (count, side), cols, shift = square_windows(
            band.height, x.shape[2], self.window_size, self.shift
        )
        narrow = band
        band, x = narrow.around_windows(x, side, shift)
        if shift == 0:
            first, last = band.whole_windows(side)
            mask = torch.zeros(x.shape[0], last - first, x.shape[2], dtype=torch.bool)
            with use_band(None):
                y = self.attend_rows(x[:, first:last], mask.to(x.device), side, cols, shift)
            return narrow.within(band, band.back_in_band(y, first))
        end = (count - 1) * side + shift  # of the last row of windows but that of both ends

        def part(start: int, stop: int, own: bool) -> tuple[int, int]:
            """Rows of this band within a range, in its numbers."""
            low, high = band.own if own else (band.start, band.stop)
            low, high = max(start, low), min(stop, high)
            return (low - band.start, high - band.start) if low < high else (0, 0)

        ends = [slice(*part(0, shift, True)), slice(*part(end, band.height, True))]
        lengths = [band.own_between(0, shift), band.own_between(end, band.height)]
        top, bottom = band.gather(1, x[:, ends[0]], x[:, ends[1]], lengths=lengths)
        first = shift + -(-(max(band.start, shift) - shift) // side) * side
        last = shift + (band.stop - shift) // side * side
        if band.stop == band.height:  # with a window that the end of the map cuts short
            last = band.height
        last = max(first, min(last, end))
        middle = x[:, first - band.start : last - band.start] if last > first else x[:, :0]
        beyond = (first - last) % side, side - top.shape[1] - bottom.shape[1]
        between, behind = (x.new_zeros(x.shape[0], n, *x.shape[2:]) for n in beyond)
        rows = torch.cat((middle, between, bottom, behind, top), 1)
        mask = torch.zeros(rows.shape[:3], dtype=torch.bool, device=x.device)
        place = middle.shape[1] + beyond[0]
        mask[:, middle.shape[1] : place] = True
        mask[:, place + bottom.shape[1] : place + bottom.shape[1] + beyond[1]] = True
        with use_band(None):
            y = self.attend_rows(rows, mask, side, cols, shift)
        out = torch.full_like(x, torch.nan)
        if last > first:
            out[:, first - band.start : last - band.start] = y[:, : middle.shape[1]]
        a, b = part(end, band.height, False)
        if a < b:
            place += band.start + a - end
            out[:, a:b] = y[:, place : place + b - a]
        a, b = part(0, shift, False)
        if a < b:
            place = y.shape[1] - shift + band.start + a
            out[:, a:b] = y[:, place : place + b - a]
        return narrow.within(band, out)

    def attend_rows(
        self, x: Tensor, mask: Tensor, side: int, cols: tuple[int, int], right: int
    ) -> Tensor:
        """Attend in rows of windows that begin with a map, [B, H, W, C] -> [B, H, W, C].

        Args:
            x: The map.
            mask: [B, H, W] bool, True for padding.
            side: Of windows.
            cols: Number and width of windows along the second side.
            right: Columns by which windows are shifted.
        """
        B, H, W = x.shape[0], x.shape[1], x.shape[2]
        rows = fixed_windows(H, side)
        padding = window_padding(x, rows, cols, mask, 0, right)
        x = to_windows(x, rows, cols, 0, right)
        x = self.attend_tokens(x, self.positions(side, cols[1]), side, cols[1], padding)
        return from_windows(x, rows, cols, (B, H, W), 0, right)

    def attend_valid(self, x: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]; each map to its part that is no padding, all at once."""
        H, W = x.shape[1], x.shape[2]
        positions: list[Tensor] = []
        valid: list[Tensor] = []
        for height, width in sizes:
            positions.append(self.positions(height, width))
            valid.append(torch.ones([1, height, width, 1], dtype=torch.bool, device=x.device))
        mask = ~join_maps(valid, H, W).flatten(1)
        x = self.attend_tokens(x.flatten(1, 2), join_maps(positions, H, W), H, W, mask)
        return split_axis(x.masked_fill(mask.unsqueeze(-1), 0), 1, [H, W])

    def positions(self, height: int, width: int) -> Tensor:
        """E for a map of this size, [1, height, width, C], float32 or float64.

        Bicubic: so the released code loads a model into one for another size.
        """
        dtype = accumulation_dtype(self.positional_encoding.dtype)
        positions = self.positional_encoding.to(dtype)
        return resized_positions(positions, self.grid_size, height, width, "bicubic")

    def attend_tokens(
        self, x: Tensor, positions: Tensor, height: int, width: int, mask: Tensor | None
    ) -> Tensor:
        """Attend over all tokens.

        Args:
            x: [B, height * width, C].
            positions: E, [1 or B, height, width, C].
            height: Of the map.
            width: Of the map.
            mask: [B, height * width] bool, True for padding.

        Returns:
            The same shape as x.
        """
        q, k, v, gate, _ = unpack(split_axis(self.qkvg(x), 2, [4, x.shape[2]]))
        shift = positions.flatten(1, 2)
        if self.scale is None:  # it is part of the projection
            x = self.attend_heads(q, (k + shift).to(k.dtype), v, gate, height, width, mask)
            return self.proj_drop(self.proj(x))
        # Added after the division, so that backward keeps no sum of keys and positions.
        scale = divisor(self.scale)
        shift = shift / scale
        queries, keys = divided(q, scale), divided(k, scale, shift)
        if torch.jit.is_scripting():
            x = self.attend_heads(queries, keys, v, gate, height, width, mask)
        else:  # the projection is kept for the sake of v: both can be made of it again
            query, key = (
                partial(divided, scale=scale.detach()),
                partial(divided, scale=scale.detach(), shift=shift.detach()),
            )
            with recomputing(queries, query, q), recomputing(keys, key, k):
                x = self.attend_heads(queries, keys, v, gate, height, width, mask)
        return self.proj_drop(self.proj(x))

    def attend_heads(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        height: int,
        width: int,
        mask: Tensor | None,
    ) -> Tensor:
        """`PolarityAttention` of [B, N, C] each."""
        heads = [self.attend.num_heads, self.attend.head_dim]
        return self.attend(
            split_axis(q, 2, heads),
            split_axis(k, 2, heads),
            split_axis(v, 2, heads),
            split_axis(gate, 2, heads),
            height,
            width,
            mask,
        )

    @torch.no_grad()
    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """This attention with the scale as part of the projection and of the positions."""
        if not (is_plain(self, PolaAttention) and is_product(self.qkvg)) or self.scale is None:
            return self
        scale = divisor(self.scale).flatten()
        of_outputs = torch.cat((scale, scale, torch.ones_like(scale).repeat(2)))
        old = [(self.qkvg.weight, of_outputs[:, None]), (self.positional_encoding, scale)]
        if self.qkvg.bias is not None:
            old.append((self.qkvg.bias, of_outputs))
        new = [nn.Parameter((x / y).to(x.dtype), x.requires_grad) for x, y in old]
        if not all(x.isfinite().all() for x in new):
            return self
        fused, projection = shared_copy(self), shared_copy(self.qkvg)
        projection.weight, fused.positional_encoding, *bias = new
        if bias:
            (projection.bias,) = bias
        fused.qkvg = projection
        fused.register_parameter("scale", None)
        return fused
