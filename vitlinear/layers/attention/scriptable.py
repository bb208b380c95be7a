"""Attention as layers call it: by name, from Python and from TorchScript."""

from __future__ import annotations

import torch
from torch import Tensor

from vitlinear.ops import RotaryTables, get_mechanism, linear_attention, packed, softmax_attention
from vitlinear.ops.eager import epilogue
from vitlinear.ops.mechanisms import MIXER_ROWS

from ..band import band_in_use
from .band_attention import band_attention


def check_attn_type(attn_type: str) -> str:
    """Return a linear mechanism of `vitlinear.ops.MECHANISMS` or ``'softmax'``.

    Raises:
        ValueError: It is neither; or it is a mechanism whose powers a layer of its own learns, or
            a part of a mixer.
    """
    if attn_type in MIXER_ROWS:
        raise ValueError(
            f"{attn_type!r} is a part of attentions by name (vitlinear.list_attentions()), and no "
            "mechanism of a layer"
        )
    if attn_type != "softmax" and get_mechanism(attn_type).takes_powers:
        raise ValueError(f"{attn_type!r} learns powers, which only layers of its own family have")
    return attn_type


def learns_temperature(attn_type: str) -> bool:
    """Whether layers learn tau, the factor of the state; see `vitlinear.ops.Mechanism`."""
    return attn_type != "softmax" and get_mechanism(attn_type).learns_temperature


def unpack(projection: Tensor) -> list[Tensor]:
    """Slices of a projection [B, N, P, h, D], and the values once more; see `ops.packed.unpack`.

    From three slices on the values come a second time, for whatever looks at them beside the
    attention. Layers take the slices from here, not by ``unbind``, whose backward pass copies all
    of their gradients together.
    """
    if torch.jit.is_scripting():
        parts: list[Tensor] = list(projection.unbind(2))
        if len(parts) > 2:
            parts.append(parts[2])
        return parts
    return list(packed.unpack(projection))


def scriptable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_type: str,
    rotary: RotaryTables | None = None,
    key_padding_mask: Tensor | None = None,
    head_scale: Tensor | None = None,
    lepe: Tensor | None = None,
    gate: Tensor | None = None,
    powers: Tensor | None = None,
    key_weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """(Attention(q, k, v) + lepe) * gate, of what is given, [B, N, h, D] -> [B, N, h, D].

    Linear attention takes the backend that is named, softmax attention always SDPA. TorchScript
    knows registered operators, not our Python dispatch: there the backend has no say.

    Args:
        q: Queries, [B, N, h, D].
        k: Keys, likewise.
        v: Values, likewise.
        attn_type: As `check_attn_type` lets pass.
        rotary: As in `vitlinear.ops.linear_attention`, like the rest.
        key_padding_mask: [B, N] bool, True for padding.
        head_scale: [h]; softmax attention has no use for it.
        lepe: Added to the attention, like q.
        gate: Multiplies the sum, like q.
        powers: Of a feature map that learns them, [h, D].
        key_weights: Of the keys, of mechanisms that are given them, [B, N, h, 1 or F].
        backend: One of `vitlinear.ops.BACKENDS`.
    """
    if torch.jit.is_scripting():
        return _scripted_attention(
            q, k, v, attn_type, rotary, key_padding_mask, head_scale, lepe, gate, powers,
            key_weights,
        )  # fmt: skip
    band = band_in_use()
    if band is not None:
        return band_attention(
            band, q, k, v, attn_type, rotary, key_padding_mask, head_scale, lepe, gate, powers,
            key_weights, backend,
        )  # fmt: skip
    if attn_type == "softmax":
        out = softmax_attention(
            q, k, v, rotary=rotary, key_padding_mask=key_padding_mask, backend="eager"
        )
        return epilogue(out, lepe, gate)
    return linear_attention(
        q, k, v, mechanism=attn_type, rotary=rotary, key_padding_mask=key_padding_mask,
        head_scale=head_scale, lepe=lepe, gate=gate, powers=powers, key_weights=key_weights,
        backend=backend,
    )  # fmt: skip


def _scripted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_type: str,
    rotary: RotaryTables | None,
    key_padding_mask: Tensor | None,
    head_scale: Tensor | None,
    lepe: Tensor | None,
    gate: Tensor | None,
    powers: Tensor | None,
    key_weights: Tensor | None,
) -> Tensor:
    """`scriptable_attention` in TorchScript, of registered operators alone."""
    rows: Tensor | None = None
    cols: Tensor | None = None
    if rotary is not None:
        rows, cols = rotary
    if attn_type != "softmax":
        return torch.ops.vitlinear.linear_attention(
            q, k, v, attn_type, rows, cols, key_padding_mask, head_scale, lepe, gate, powers,
            key_weights,
        )[0]  # fmt: skip
    out = torch.ops.vitlinear.softmax_attention(q, k, v, rows, cols, key_padding_mask)[0]
    out = out if lepe is None else lepe + out
    return out if gate is None else out * gate
