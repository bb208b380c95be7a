"""Linear attention as layers call it, from Python and from TorchScript."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import RotaryTables, linear_attention


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str,
    backend: str,
    positions: RotaryTables | None = None,
    key_padding_mask: Tensor | None = None,
    head_scale: Tensor | None = None,
    lepe: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """`vitlinear.ops.linear_attention`, [B, N, h, D] -> [B, N, h, D], also when scripted.

    TorchScript knows registered operators, not our Python dispatch: there, backend has no say.
    """
    if torch.jit.is_scripting():
        rows: Tensor | None = None
        cols: Tensor | None = None
        if positions is not None:
            rows, cols = positions
        return torch.ops.vitlinear.linear_attention(
            q, k, v, rows, cols, key_padding_mask, head_scale, lepe, gate, mechanism
        )[0]
    return linear_attention(
        q, k, v, mechanism, positions, key_padding_mask, head_scale, backend, lepe, gate
    )
