"""Position tables for heads [B, h, D, N], made once for a stage."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitlinear.layers import MapFullWidthRotaryTables, MapRotaryTables
from vitlinear.ops import RotaryTables

from .layers import require


class Angles(NamedTuple):
    """Cosines and sines of the angles of every token of a map.

    Attributes:
        cos: [P, N], or [h, P, N] where heads differ; P is D/2 for rotary positions, of which each
            turns two channels, and D for the cosine encoding.
        sin: Likewise.
    """

    cos: Tensor
    sin: Tensor


def angles(tables: RotaryTables) -> tuple[Tensor, Tensor]:
    """Cosine and sine, [2 g, N] each, of tables of both axes: rows first, then columns."""
    height, width = tables.rows.shape[0], tables.cols.shape[0]
    rows = tables.rows.permute(2, 1, 0)[..., None].expand(-1, -1, -1, width)
    cols = tables.cols.permute(2, 1, 0)[:, :, None].expand(-1, -1, height, -1)
    cos, sin = torch.cat((rows, cols), dim=1).flatten(2)
    return cos, sin


class MapAngles(nn.Module):
    """Makes the `Angles` of a map.

    With the size of the map known, the tables of its axes are constants. A runtime then makes those
    of all tokens when it loads the program.
    """

    def __init__(self, maker: nn.Module, num_heads: int) -> None:
        """Note what the tables are for.

        Args:
            maker: Of the tables of a stage.
            num_heads: Heads of its blocks.

        Raises:
            NoForm: The tables are others.
        """
        super().__init__()
        require(maker, MapRotaryTables, MapFullWidthRotaryTables)
        self.maker = maker
        self.num_heads = num_heads
        self.register_buffer("rows", None)
        self.register_buffer("cols", None)

    def fix(self, x: Tensor) -> None:
        """Keep the tables of maps of this size, [B, C, H, W]: no others will come."""
        self.rows, self.cols = self.maker(x)

    def forward(self, x: Tensor) -> Angles:
        """A map [B, C, H, W] -> its angles."""
        tables = self.maker(x) if self.rows is None else RotaryTables(self.rows, self.cols)
        cos, sin = angles(tables)
        if isinstance(self.maker, MapFullWidthRotaryTables):
            cos, sin = (y.reshape(self.num_heads, -1, y.shape[1]) for y in (cos, sin))
        return Angles(cos, sin)
