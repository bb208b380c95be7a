"""Mixers that are a row of the linear attention operator, or are made of one.

`vitlinear.ops` has the formula, its backends and its derivatives. What is here gives it tokens of a
`Grid`, with tokens before the map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitlinear.layers.attention.scriptable import scriptable_attention
from vitlinear.layers.band import BANDED, band_in_use

from .grid import Grid
from .mixer import Mixer


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_type: str,
    grid: Grid,
    head_scale: Tensor | None = None,
    lepe: Tensor | None = None,
    gate: Tensor | None = None,
    powers: Tensor | None = None,
    key_weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """(Attention(q, k, v) + lepe) * gate by the operator, on the tokens of a grid.

    Args:
        q: Queries, [B, N, h, D]; or features of theirs, of any width, where phi_q is the identity.
        k: Keys, likewise.
        v: Values, [B, N, h, Dv].
        attn_type: Row of `vitlinear.ops.get_mechanism`, or ``'softmax'``.
        grid: Where the tokens stand. Its position tables turn those of the map.
        head_scale: [h], as in `vitlinear.ops.linear_attention`, like the rest.
        lepe: Added, like v.
        gate: Multiplies the sum, like v.
        powers: [h, D].
        key_weights: [B, N, h, 1 or F], of rows that are given them.
        backend: One of `vitlinear.ops.BACKENDS`.

    Returns:
        [B, N, h, Dv].
    """
    mask, rotary = grid.key_padding_mask, grid.rotary
    prefix = grid.num_prefix_tokens
    if rotary is None or prefix == 0:
        return scriptable_attention(
            q, k, v, attn_type, rotary, mask, head_scale, lepe, gate, powers, key_weights,
            backend=backend,
        )  # fmt: skip
    if band_in_use() is not None:
        raise ValueError(
            "rotary positions with tokens before the map cannot run on bands of rows: leave the "
            "class token out, or the positions"
        )
    # The operator knows positions of grids alone. Tokens before the map become the first tokens of
    # rows above it, which turn by nothing; what stands beside them is padding.
    ahead = _RowsAhead(prefix, grid.width)
    padding = torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device) if mask is None else mask
    out = scriptable_attention(
        ahead.put(q), ahead.put(k), ahead.put(v), attn_type,
        type(rotary)(ahead.still(rotary.rows), rotary.cols),
        ahead.put(padding, fill=True),
        head_scale,
        None if lepe is None else ahead.put(lepe),
        None if gate is None else ahead.put(gate),
        powers,
        None if key_weights is None else ahead.put(key_weights),
        backend=backend,
    )  # fmt: skip
    return ahead.take(out)


class _RowsAhead:
    """Tokens before the map as rows of the map: [B, P + H W, ...] <-> [B, (P + H) W, ...]."""

    def __init__(self, prefix: int, width: int) -> None:
        self.prefix = prefix
        self.width = width

    def put(self, x: Tensor, fill: bool = False) -> Tensor:
        first, rest = x[:, : self.prefix], x[:, self.prefix :]
        shape = (x.shape[0], self.prefix, self.width - 1, *x.shape[2:])
        rows = torch.cat((first.unsqueeze(2), x.new_full(shape, fill)), dim=2)
        return torch.cat((rows.flatten(1, 2), rest), dim=1)

    def take(self, x: Tensor) -> Tensor:
        end = self.prefix * self.width
        return torch.cat((x[:, : end : self.width], x[:, end:]), dim=1)

    def still(self, rows: Tensor) -> Tensor:
        """The table of the rows, with rows ahead whose cosines are 1 and sines 0."""
        still = torch.zeros_like(rows[:1])
        still[..., 0] = 1
        return torch.cat((still.expand(self.prefix, -1, -1), rows))


class OperatorMixer(Mixer):
    """A mixer that is a row of the operator, which runs on every backend and on bands of rows.

    Attributes:
        row: Class attribute: key in `vitlinear.ops.MECHANISMS`, or ``softmax``.
    """

    row: str
    row_rule = BANDED

    @torch.jit.unused  # a `Grid` is no type of TorchScript's; layers give the row to the operator
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """Mix values; see `Mixer.forward`."""
        grid.check(q)
        self.description.check_length(q.shape[1])
        return attend(
            q, k, v, self.row, grid, self.head_scale(), powers=self.powers(), backend=self.backend
        )

    @torch.jit.ignore
    def row_gather(self, height: int) -> int:
        """Channels of keys and values that a band needs of all rows: those of softmax attention."""
        return 2 * self.dim if self.row == "softmax" else 0

    def head_scale(self) -> Tensor | None:
        """tau, [h]; None for 1."""
        return None

    def powers(self) -> Tensor | None:
        """Powers of a feature map that learns them, [h, D]; None for the others."""
        return None

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The quadratic form of the operator; see `Mixer.definition`."""
        from vitlinear.ops import naive

        assert grid.rotary is None or grid.num_prefix_tokens == 0
        if self.row == "softmax":
            return naive.softmax_attention(q, k, v, grid.rotary)
        return naive.linear_attention(
            q, k, v, self.row, grid.rotary, None, self.head_scale(), powers=self.powers()
        )
