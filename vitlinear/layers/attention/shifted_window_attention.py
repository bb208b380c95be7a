"""Softmax attention in windows of a map, shifted by half a window in every other block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import RelPosBias
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.ops import accumulation_dtype

from ..band import BANDED, LOCAL, Band, band_in_use, use_band
from ..heads import split_heads
from ..layout import split_axis
from ..linear import Linear
from ..padding_rule import SIZES
from ..windows import (
    fits,
    fixed_windows,
    from_windows,
    join_maps,
    square_windows,
    to_windows,
    varies,
    window_places,
)
from .scriptable import unpack
from .softmax_attention import SoftmaxAttention


class WindowBias(RelPosBias):
    """A bias for each pair of places of a square window, resized for windows of other sides."""

    row_rule = LOCAL

    def __init__(
        self,
        side: int,
        num_heads: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((side, side), num_heads, device=device, dtype=dtype)
        self.side = side

    @torch.jit.unused
    def leave_meta(self) -> None:
        """Make the index where the table is: no file has it, which ``assign=True`` would assign."""
        table, index = self.relative_position_bias_table, self.relative_position_index
        assert isinstance(index, Tensor)
        if index.is_meta and not table.is_meta:
            made = torch.empty(index.shape, dtype=index.dtype, device=table.device)
            self.register_buffer("relative_position_index", made, persistent=False)
            self.init_non_persistent_buffers()

    def forward(self, attn: Tensor, shared_rel_pos: Tensor | None = None, side: int = 0) -> Tensor:
        """Add the biases of windows to logits [B, h, N, N], or to [1].

        Args:
            attn: The logits.
            shared_rel_pos: Unused; timm's callers may give it.
            side: Of the windows, N = side^2; 0 for that of the table.
        """
        if varies(side) or (side != 0 and side != self.side):
            return attn + resized_biases(self.relative_position_bias_table, self.side, side)
        if not torch.jit.is_scripting():
            self.leave_meta()
        return attn + self.get_bias()


# One step to torch.fx, as `GatedAttention`.
@register_notrace_module
class ShiftedWindowAttention(nn.Module):
    """proj(softmax attention with a bias for each relative position) in windows of K x K tokens.

    Maps are padded to whole windows; padding is no key. A side that one window covers is not
    shifted. Source: Swin transformer (arXiv:2103.14030) as the released InLine-Swin has it.

    With ``square`` windows are never longer than the map's shorter side, and where they are as long
    neither side is shifted: so the released PolaFormer has it. The biases are resized to them.
    """

    padding_rule = SIZES
    row_rule = BANDED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift: bool = False,
        proj_drop: float = 0.0,
        backend: str = "auto",
        square: bool = False,
        table_size: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the attention.

        Args:
            dim: Channels, C.
            num_heads: Heads, each of C / num_heads channels.
            window_size: Side of a window, K.
            shift: Whether windows begin half a window further on.
            proj_drop: Dropout rate of the output.
            backend: One of `vitlinear.ops.BACKENDS`; softmax runs on SDPA whatever it is.
            square: Whether windows shrink to the map's shorter side.
            table_size: Side of the windows that there is a bias for each pair of places of; by
                default K. With square windows alone.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: dim does not divide into heads, the window is empty, or the backend is
                unknown.
        """
        super().__init__()
        if window_size < 1:
            raise ValueError(f"a window needs a side of at least 1, got {window_size}")
        self.window_size = window_size
        self.shift = window_size // 2 if shift else 0
        self.square = square
        self.attend = SoftmaxAttention(num_heads, split_heads(dim, num_heads), backend)
        self.qkv = Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.rel_pos = WindowBias(table_size or window_size, num_heads, device=device, dtype=dtype)
        self.proj = Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, valid_sizes: list[tuple[int, int]] | None = None) -> Tensor:
        """Attend inside every window.

        Args:
            x: [B, H, W, C].
            valid_sizes: Height and width of the part of each map that is no padding: each is
                attended to like a map of its own, with windows of its own, and padding gets 0.

        Returns:
            The same shape.
        """
        if valid_sizes is None:
            return self.attend_map(x)
        maps: list[Tensor] = []
        for i, (height, width) in enumerate(valid_sizes):
            maps.append(self.attend_map(x[i : i + 1, :height, :width]))
        return join_maps(maps, x.shape[1], x.shape[2])

    def attend_map(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        if not torch.jit.is_scripting():
            band = band_in_use()
            if band is not None:
                return self.attend_whole_windows(band, x)
        B, H, W = x.shape[0], x.shape[1], x.shape[2]
        rows, cols, down, right = self.split(H, W)
        regions = window_regions((B, H, W), rows, cols, down, right, x.device)
        x = self.attend_windows(to_windows(x, rows, cols, down, right), regions, rows[1])
        return from_windows(x, rows, cols, (B, H, W), down, right)

    def split(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int], int, int]:
        """Windows along both sides of a map, and their shift down and to the right."""
        side = self.window_size
        if self.square:
            rows, cols, shift = square_windows(height, width, side, self.shift > 0)
            return rows, cols, shift, shift
        rows, cols = fixed_windows(height, side), fixed_windows(width, side)
        # 1 // n is 1 for one window and 0 for more.
        return rows, cols, self.shift * (1 - 1 // rows[0]), self.shift * (1 - 1 // cols[0])

    def attend_windows(self, x: Tensor, regions: Tensor | None, side: int) -> Tensor:
        """Attend.

        Args:
            x: Windows, [B * windows, side * side, C].
            regions: As `window_regions` gives them.
            side: Of a window.

        Returns:
            In the shape of x.
        """
        heads, C = self.attend.num_heads, x.shape[2]
        q, k, v, _ = unpack(split_axis(self.qkv(x), 2, [3, heads, C // heads]))
        bias = self.biases(q.new_zeros(1), regions, side)
        return self.proj_drop(self.proj(self.attend(q, k, v, bias)))

    def biases(self, zero: Tensor, regions: Tensor | None, side: int) -> Tensor:
        """Biases of logits, with what hides keys.

        Args:
            zero: [1]; tells type and device.
            regions: As `window_regions` gives them.
            side: Of a window.

        Returns:
            [h, N, N] or [1, h, N, N], or [B * windows, h, N, N] where keys are hidden.
        """
        logits = zero
        if regions is not None:
            hidden = regions[:, None, :, None] != regions[:, None, None, :]
            logits = zero.new_zeros(hidden.shape).masked_fill(hidden, -torch.inf)
        # The module is called, not asked for its bias: hooks run, and weights may be made for each
        # call.
        bias: Tensor = self.rel_pos(logits, None, side)
        return bias.to(zero.dtype)

    @torch.jit.ignore
    def row_reach(self, height: int) -> int:
        """Rows around that windows may need."""
        return self.window_size - 1

    @torch.jit.ignore
    def attend_whole_windows(self, band: Band, x: Tensor) -> Tensor:
        """`attend_map` of the windows that a band sees whole.

        The shifted window that holds both ends of the map is two here, cut short: tokens of the two
        ends do not see each other.
        """
        band.check_rows(x.shape[1])
        (_, side), cols, down, right = self.split(band.height, x.shape[2])
        wide, x = band.around_windows(x, side, down)
        first, last = wide.whole_windows(side, down)
        x = x[:, first:last]
        above = side - down if down and wide.start == 0 else 0
        x = F.pad(x, [0, 0, 0, 0, above, 0])
        B, H, W = x.shape[0], x.shape[1], x.shape[2]
        rows = fixed_windows(H, side)
        regions = window_regions((B, H, W), rows, cols, 0, right, x.device)
        if above:
            row = window_places(B, rows, cols, 0, right, x.device)[1]
            regions = torch.zeros_like(row) if regions is None else regions
            regions = regions.masked_fill(row < above, 4)
        with use_band(None):
            x = self.attend_windows(to_windows(x, rows, cols, 0, right), regions, side)
        x = from_windows(x, rows, cols, (B, H, W), 0, right)
        return band.within(wide, wide.back_in_band(x[:, above:], first))


def resized_biases(table: Tensor, table_size: int, side: int) -> Tensor:
    """The bias of each pair of places of a window, from a table for windows of another side.

    Bicubic, by which released Swin transformers load a table for other windows.

    Args:
        table: [(2 * table_size - 1)^2, h], by offsets down and to the right.
        table_size: Side of the windows that the table is for.
        side: Side of the window.

    Returns:
        [h, side^2, side^2], float32 or float64.
    """
    length, wanted = 2 * table_size - 1, 2 * side - 1
    x = table.to(accumulation_dtype(table.dtype)).t().reshape(1, -1, length, length)
    x = F.interpolate(x, size=[wanted, wanted], mode="bicubic", align_corners=False)
    place = torch.arange(side * side, device=table.device)
    row = place // side
    col = place - row * side
    down, right = row[:, None] - row + side - 1, col[:, None] - col + side - 1
    return x[0].flatten(1)[:, down * wanted + right]


def window_regions(
    size: tuple[int, int, int],
    rows: tuple[int, int],
    cols: tuple[int, int],
    down: int,
    right: int,
    device: torch.device,
) -> Tensor | None:
    """Numbers, [B * windows, tokens], that are equal for tokens that belong together; or None.

    None where all tokens of a window do.

    A shifted window at the end of a side holds tokens of both ends of the map, which do not see
    each other; padding sees only padding.
    """
    B, H, W = size
    if fits(H, rows) and fits(W, cols) and down == 0 and right == 0:
        return None
    _, row, col = window_places(B, rows, cols, down, right, device)
    regions = 2 * (row < down).long() + (col < right).long()
    return regions.masked_fill((row >= H) | (col >= W), 4)
