"""The optional terms of an attention, in the one order that all of this folder keeps.

Every function that takes them does so in the order q, k, v, mechanism, terms, backend. They travel
as `Terms`; only registered operators, whose arguments are tensors, take them one by one
(`FlatTerms`).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .rotary import RotaryTables


class FlatTerms(NamedTuple):
    """`Terms` as the arguments of a registered operator.

    Attributes:
        rows: Table of the rows of the grid, [H, g, 2]; None without positions.
        cols: Table of its columns, [W, g, 2]; None without positions.
        key_padding_mask: As in `Terms`, like the rest.
        head_scale: [h].
        lepe: [B, N, h, Dv].
        gate: [B, N, h, Dv].
        powers: [h, D].
        key_weights: [B, N, h, 1 or F].
    """

    rows: Tensor | None = None
    cols: Tensor | None = None
    key_padding_mask: Tensor | None = None
    head_scale: Tensor | None = None
    lepe: Tensor | None = None
    gate: Tensor | None = None
    powers: Tensor | None = None
    key_weights: Tensor | None = None


class Terms(NamedTuple):
    """All that an attention may be given besides q, k, v and its mechanism.

    Attributes:
        rotary: Position tables of the H x W grid of tokens.
        key_padding_mask: [B, N] bool, True for padding.
        head_scale: tau, a factor of the state for each head, [h].
        lepe: Added to the output, [B, N, h, Dv].
        gate: Multiplies the sum of output and lepe, [B, N, h, Dv].
        powers: Of a feature map that learns them, [h, D].
        key_weights: Of keys, for mechanisms that do not make them, [B, N, h, 1 or F].
    """

    rotary: RotaryTables | None = None
    key_padding_mask: Tensor | None = None
    head_scale: Tensor | None = None
    lepe: Tensor | None = None
    gate: Tensor | None = None
    powers: Tensor | None = None
    key_weights: Tensor | None = None

    def flatten(self) -> FlatTerms:
        """The same with the position tables as two tensors."""
        rotary, *others = self
        rows, cols = (None, None) if rotary is None else rotary
        return FlatTerms(rows, cols, *others)

    @classmethod
    def unflatten(cls, rows: Tensor | None, cols: Tensor | None, *others: Tensor | None) -> Terms:
        """The terms that `flatten` made these of."""
        rotary = None if rows is None or cols is None else RotaryTables(rows, cols)
        return cls(rotary, *others)
