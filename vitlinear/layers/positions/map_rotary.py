"""Rotary tables of a map, which all attentions of a stage share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.ops import (
    RotaryTables,
    full_width_rotary_tables,
    lrpe_tables,
    rotary_tables,
    table_dtype,
)

from ..band import BANDED, band_in_use


def rows_of_map(height: int) -> int:
    """Rows of the whole map, of what the forward pass sees; see `of_band`."""
    if not torch.jit.is_scripting():
        band = band_in_use()
        if band is not None:
            band.check_rows(height)
            return band.height
    return height


def of_band(tables: RotaryTables) -> RotaryTables:
    """Tables of the whole map -> those of the rows that the forward pass sees."""
    if not torch.jit.is_scripting():
        band = band_in_use()
        if band is not None:
            return RotaryTables(tables.rows[band.start : band.stop], tables.cols)
    return tables


# One step to torch.fx, whatever the size of the map.
@register_notrace_module
class MapRotaryTables(nn.Module):
    """Makes the tables of `vitlinear.ops.rotary_tables`, or of `lrpe_tables`, for maps."""

    row_rule = BANDED

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
        """A map [B, C, H, W] -> its tables, of the type that attention to it wants."""
        dtype = table_dtype(x)
        height, width = rows_of_map(x.shape[2]), x.shape[3]
        if self.cosine:
            return of_band(lrpe_tables(height, width, self.head_dim, x.device, dtype))
        return of_band(rotary_tables(height, width, self.head_dim, x.device, dtype))


# One step to torch.fx, as above.
@register_notrace_module
class MapFullWidthRotaryTables(nn.Module):
    """Makes the tables of `vitlinear.ops.full_width_rotary_tables` for maps."""

    row_rule = BANDED

    def forward(self, x: Tensor) -> RotaryTables:
        """A map [B, C, H, W] -> its tables, of the type that attention to it wants."""
        dtype = table_dtype(x)
        height, width = rows_of_map(x.shape[2]), x.shape[3]
        return of_band(full_width_rotary_tables(height, width, x.shape[1], x.device, dtype))
