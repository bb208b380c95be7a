"""Attention as layers call it, from Python and from TorchScript."""

from __future__ import annotations

import torch
from torch import Tensor

from vitlinear.ops import RotaryTables, get_mechanism, linear_attention, softmax_attention
from vitlinear.ops.eager import epilogue


def check_attn_type(attn_type: str) -> str:
    """Return a linear mechanism of `vitlinear.ops.MECHANISMS` or ``'softmax'``.

    Raises:
        ValueError: It is neither.
    """
    if attn_type != "softmax":
        get_mechanism(attn_type)
    return attn_type


def learns_temperature(attn_type: str) -> bool:
    """Whether layers learn tau, the factor of the state, as the definition of L2ViT does."""
    return attn_type == "l2"


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

    Or softmax attention, where mechanism says so: on SDPA, without a head_scale. The result is
    (Attention(q, k, v) + lepe) * gate, of what is given.

    TorchScript knows registered operators, not our Python dispatch: there, backend has no say.
    """
    rows: Tensor | None = None
    cols: Tensor | None = None
    if positions is not None:
        rows, cols = positions
    if mechanism == "softmax":
        if torch.jit.is_scripting():
            out = torch.ops.vitlinear.softmax_attention(q, k, v, rows, cols, key_padding_mask)[0]
        else:
            out = softmax_attention(q, k, v, positions, key_padding_mask, backend="eager")
        if torch.jit.is_scripting():
            out = out if lepe is None else lepe + out
            return out if gate is None else out * gate
        return epilogue(out, lepe, gate)
    if torch.jit.is_scripting():
        return torch.ops.vitlinear.linear_attention(
            q, k, v, rows, cols, key_padding_mask, head_scale, lepe, gate, mechanism
        )[0]
    return linear_attention(
        q, k, v, mechanism, positions, key_padding_mask, head_scale, backend, lepe, gate
    )
