"""Rotary tables of a map, which all attentions of a stage share."""

from __future__ import annotations

from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.ops import (
    RotaryTables,
    accumulation_dtype,
    full_width_rotary_tables,
    lrpe_tables,
    rotary_tables,
)


# One step to torch.fx, whatever the size of the map.
@register_notrace_module
class MapRotaryTables(nn.Module):
    """Makes the tables of `vitlinear.ops.rotary_tables`, or of `lrpe_tables`, for maps."""

    def __init__(self, head_dim: int, cosine: bool = False) -> None:
        """Note what the tables are for.

        Args:
            head_dim: Channels of a head, D.
            cosine: Make those of LightNet's cosine encoding.
        """
        super().__init__()
        self.head_dim = head_dim
        self.cosine = cosine

    def forward(self, x: Tensor) -> RotaryTables:
        """A map [B, C, H, W] -> its tables, in the type that attention to it accumulates in."""
        dtype = accumulation_dtype(x.dtype)
        if self.cosine:
            return lrpe_tables(x.shape[2], x.shape[3], self.head_dim, x.device, dtype)
        return rotary_tables(x.shape[2], x.shape[3], self.head_dim, x.device, dtype)


# One step to torch.fx, as above.
@register_notrace_module
class MapFullWidthRotaryTables(nn.Module):
    """Makes the tables of `vitlinear.ops.full_width_rotary_tables` for maps."""

    def forward(self, x: Tensor) -> RotaryTables:
        """A map [B, C, H, W] -> its tables, in the type that attention to it accumulates in."""
        dtype = accumulation_dtype(x.dtype)
        return full_width_rotary_tables(x.shape[2], x.shape[3], x.shape[1], x.device, dtype)
