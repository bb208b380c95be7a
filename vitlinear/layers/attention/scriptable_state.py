"""States of linear attention as layers make and read them, from Python and from TorchScript."""

from __future__ import annotations

import torch
from torch import Tensor

from vitlinear.ops import (
    LinearAttentionState,
    RotaryTables,
    cpu,
    linear_attention_state,
    read_linear_attention_state,
)
from vitlinear.ops.precision import accumulation_dtype
from vitlinear.ops.rotary import is_full_width, rotate, token_table

from ..band import band_in_use
from .band_attention import band_state


def scriptable_state(
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
    later: bool = True,
    key_weights: Tensor | None = None,
) -> Tensor:
    """Mean of k v^T over the tokens, the state of the mechanism ``identity``.

    Args:
        k: Keys, [B, N, h, D], turned already.
        v: Values, [B, N, h, Dv].
        key_padding_mask: [B, N] bool, True for padding.
        backend: One of `vitlinear.ops.BACKENDS`.
        later: On bands of rows: whether NaN may stand for the state until it is known, as where it
            is read and nothing else. Sums of the layer that depend on it, and solvers, forbid that.
        key_weights: Factors of the keys, of each token and head, [B, N, h, 1], or of each channel,
            [B, N, h, D].

    Returns:
        [B, h, D, Dv], float32, or float64 for float64.
    """
    mechanism = "identity"
    if key_weights is not None:
        of_each_channel = key_weights.shape[3] > 1
        mechanism = "gated_identity" if of_each_channel else "weighted_identity"
    if torch.jit.is_scripting():
        return torch.ops.vitlinear.linear_attention_state(
            k, v, mechanism, None, None, key_padding_mask, None, key_weights
        )[0]
    else:  # noqa: RET505  TorchScript leaves out the branch not taken, but not what follows it
        band = band_in_use()
        if band is not None:
            return band_state(band, k, v, key_padding_mask, later, key_weights)
        return linear_attention_state(
            k, v, mechanism=mechanism, key_padding_mask=key_padding_mask, key_weights=key_weights,
            backend=backend,
        ).state  # fmt: skip


def scriptable_read(
    q: Tensor,
    state: Tensor,
    rotary: RotaryTables | None = None,
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """R(q) S, a read of a state of the mechanism ``identity``.

    Args:
        q: Queries, [B, N, h, D].
        state: [B, h, D, Dv], or [1, h, D, Dv] for all samples, float32, or float64 for float64.
        rotary: Tables for all heads side by side, or for each alike.
        key_padding_mask: [B, N] bool, True for padding, whose output is 0.
        backend: One of `vitlinear.ops.BACKENDS`.

    Returns:
        [B, N, h, Dv].
    """
    if torch.jit.is_scripting():
        rows: Tensor | None = None
        cols: Tensor | None = None
        if rotary is not None:
            rows, cols = rotary
        return torch.ops.vitlinear.read_linear_attention_state(
            q, state, None, None, "identity", rows, cols, key_padding_mask, None, None, None, None
        )
    else:  # noqa: RET505
        return read_linear_attention_state(
            q, LinearAttentionState(state), mechanism="identity", rotary=rotary,
            key_padding_mask=key_padding_mask, backend=backend,
        )  # fmt: skip


def turned(x: Tensor, rotary: RotaryTables | None) -> Tensor:
    """Tokens [B, N, h, D] under the rotary encoding, rounded to their type.

    For what reads a token more than once; attention that reads it once turns it itself. In memory,
    heads stand before tokens.
    """
    if rotary is None:
        return x
    if torch.jit.is_scripting():
        return _scripted_rotation(x, rotary)
    else:  # noqa: RET505
        heads = x.shape[2] if is_full_width(rotary, x.shape[2], x.shape[3]) else 1
        # Tables for a GPU may be float16, in which small gradients of bfloat16 tokens are 0.
        table = token_table(rotary, heads).to(accumulation_dtype(x.dtype))
        tokens = cpu.own(x.transpose(1, 2).to(table.dtype))
        return rotate(tokens, table, own=True).to(x.dtype).transpose(1, 2)


def _scripted_rotation(x: Tensor, rotary: RotaryTables) -> Tensor:
    """`turned` pair by pair, of operators that TorchScript has on every device."""
    dtype = accumulation_dtype(x.dtype)
    rows, cols = rotary.rows.to(dtype), rotary.cols.to(dtype)
    grid = [rows.shape[0], cols.shape[0], rows.shape[1], 2]
    angles = torch.cat((rows[:, None].expand(grid), cols[None].expand(grid)), dim=2).flatten(0, 1)
    cos, sin = angles[..., 0], angles[..., 1]
    pairs = x.to(dtype).flatten(2).unflatten(2, [-1, rows.shape[1] * 2, 2])
    x0, x1 = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None], sin[:, None]
    out = torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), dim=-1)
    return out.reshape(x.shape).to(x.dtype)
