"""Softmax attention inside windows, without positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module

from ..band import BANDED, band_in_use, use_band
from ..heads import split_heads
from ..layout import split_axis
from ..linear import Linear
from ..padding_rule import ZEROS
from ..windows import fixed_windows, from_windows, to_windows
from .scriptable import unpack
from .softmax_attention import SoftmaxAttention


# One step to torch.fx, for the reasons that `GatedAttention` gives.
@register_notrace_module
class PaddedWindowAttention(nn.Module):
    """Softmax attention in windows of K x K tokens: no shift, no relative position bias.

    Maps are padded with zeros to whole windows, to the right and below, and padding is attended to
    like any other token: that is how the released L2ViT models (arXiv:2501.16182) were trained, so
    that a mask would change what they compute.
    """

    padding_rule = ZEROS
    row_rule = BANDED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the attention.

        Args:
            dim: Channels, C.
            num_heads: Heads, each of C / num_heads channels.
            window_size: Side of a window in tokens, K.
            proj_drop: Dropout rate of the output.
            backend: One of `vitlinear.ops.BACKENDS`; softmax runs on SDPA whatever it is.
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
        self.attend = SoftmaxAttention(num_heads, split_heads(dim, num_heads), backend)
        self.qkv = Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.proj = Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Attend inside every window.

        Args:
            x: [B, H, W, C], of any size.

        Returns:
            [B, H, W, C].
        """
        if torch.jit.is_scripting():
            return self.attend_map(x)
        else:  # noqa: RET505
            band = band_in_use()
            if band is None:
                return self.attend_map(x)
            band.check_rows(x.shape[1])
            wide, x = band.around_windows(x, self.window_size)
            first, last = wide.whole_windows(self.window_size)
            with use_band(None):
                x = self.attend_map(x[:, first:last])
            return band.within(wide, wide.back_in_band(x, first))

    @torch.jit.ignore
    def row_reach(self, height: int) -> int:
        """Rows around that windows may need."""
        return self.window_size - 1

    def attend_map(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        B, H, W, C = x.shape
        side, heads = self.window_size, self.attend.num_heads
        rows, cols = fixed_windows(H, side), fixed_windows(W, side)
        x = to_windows(x, rows, cols)
        q, k, v, _ = unpack(split_axis(self.qkv(x), 2, [3, heads, C // heads]))
        x = from_windows(self.attend(q, k, v), rows, cols, (B, H, W))
        return self.proj_drop(self.proj(x))
