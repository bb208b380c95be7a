"""Rotary tables of a map, which all attentions of a stage share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.ops import RotaryTables, accumulation_dtype, lrpe_tables, rotary_tables

from ..band import BANDED, band_in_use


def map_tables(
    cosine: bool, height: int, width: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> RotaryTables:
    """Tables of a map; of a band of one those of its rows.

    Args:
        cosine: Make those of `lrpe_tables`, not those of `rotary_tables`.
        height: Rows of what the forward pass sees.
        width: Columns.
        head_dim: Channels of a head, D.
        device: Where the tables live.
        dtype: Type that attention accumulates in.
    """
    if not torch.jit.is_scripting():
        band = band_in_use()
        if band is not None:
            band.check_rows(height)
            rows, cols = _tables(cosine, band.height, width, head_dim, device, dtype)
            return RotaryTables(rows[band.start : band.stop], cols)
    return _tables(cosine, height, width, head_dim, device, dtype)


def _tables(
    cosine: bool, height: int, width: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> RotaryTables:
    if cosine:
        return lrpe_tables(height, width, head_dim, device, dtype)
    return rotary_tables(height, width, head_dim, device, dtype)


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
        """A map [B, C, H, W] -> its tables, in the type that attention to it accumulates in."""
        dtype = accumulation_dtype(x.dtype)
        return map_tables(self.cosine, x.shape[2], x.shape[3], self.head_dim, x.device, dtype)
