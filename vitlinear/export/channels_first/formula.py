"""Attention between projections, on heads [B, h, D, N]: nothing moves in memory.

Queries and keys come in parts, each from a product of its own: even and odd channels where
positions turn neighbouring pairs. Rotation then takes two parts to two parts, without a slice or a
concatenation, and a product over all channels is the sum of those over the parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitlinear.ops.mechanisms import MECHANISMS, Mechanism

from .positions import Angles

Parts = tuple[Tensor, ...]


def rotate(parts: Parts, angles: Angles) -> Parts:
    """Turn even and odd channels, [B, h, D/2, N] each and one after the other, by the positions."""
    turned: list[Tensor] = []
    for even, odd in zip(parts[::2], parts[1::2], strict=True):
        turned.append(even * angles.cos - odd * angles.sin)
        turned.append(odd * angles.cos + even * angles.sin)
    return tuple(turned)


def encode(parts: Parts, angles: Angles) -> Parts:
    """The cosine encoding: each part [B, h, D, N] times the cosines, and times the sines."""
    return tuple(x * table for x in parts for table in angles)


def product(a: Parts, b: Parts) -> Tensor:
    """Sum over the parts of a^T b, [B, h, D, N] and [B, h, D, M] -> [B, h, N, M]."""
    out = a[0].mT @ b[0]
    for x, y in zip(a[1:], b[1:], strict=True):
        out = out + x.mT @ y
    return out


def elu_plus_one(x: Tensor) -> Tensor:
    """``elu(x) + 1`` of steps that runtimes fuse."""
    return x.clamp(min=0) + x.clamp(max=0).exp()


def split_signs(x: Tensor) -> tuple[Tensor, Tensor]:
    """x where it is positive, and -x where it is negative; 0 elsewhere."""
    positive = x.clamp(min=0)
    return positive, positive - x


def norm_aware(parts: Parts) -> Parts:
    """`vitlinear.ops.features.norm_aware_query`: two parts, of positive and negative, for each."""
    square = (parts[0] * parts[0]).sum(2, keepdim=True)
    for x in parts[1:]:
        square = square + (x * x).sum(2, keepdim=True)
    norm = square.sqrt()
    inverse = norm.clamp(min=1e-19).reciprocal()
    power = 1.5 + 3 * norm.tanh()
    halves = []
    for x in parts:
        direction = x * inverse
        halves.append(split_signs(direction.abs() ** power * direction.sign()))
    return tuple(x for x, _ in halves) + tuple(x for _, x in halves)


def cubed(parts: Parts) -> Parts:
    """`vitlinear.ops.features.cubed_key`, in parts as `norm_aware`."""
    halves = [split_signs(x * x * x) for x in parts]
    return tuple(x for x, _ in halves) + tuple(x for _, x in halves)


FEATURES: dict[str, Callable[[Parts], Parts]] = {
    "elu+1": lambda parts: tuple(map(elu_plus_one, parts)),
    "relu": lambda parts: tuple(x.clamp(min=0) for x in parts),
    "silu": lambda parts: tuple(x * x.sigmoid() for x in parts),
    "identity": lambda parts: parts,
    "norm-aware": norm_aware,
    "cubed": cubed,
}


def is_covered(name: str) -> bool:
    """Whether `attention` computes what layers call by this name."""
    if name == "softmax":
        return True
    row = MECHANISMS.get(name)
    return (
        row is not None
        and {row.query_map, row.key_map} <= FEATURES.keys()
        and not row.reads_opposite
    )


def linear_attention(
    q: Parts, k: Parts, v: Tensor, mechanism: Mechanism, angles: Angles | None,
    head_scale: Tensor | None = None, tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`vitlinear.ops.linear_attention` on heads [B, h, D, N]; see `vitlinear.ops.mechanisms`.

    Args:
        q: Queries in parts.
        k: Keys in parts.
        v: Values, [B, h, Dv, N].
        mechanism: Row of the table.
        angles: Positions of the map; None for none.
        head_scale: tau, [h].
        tokens: How many of each sample there are, [B, 1, 1, 1], where the others are padding: their
            keys and values are 0, and have to be 0 after feature maps, and no softmax is over keys.
            None where all of them are.

    Returns:
        [B, h, Dv, N].
    """
    length: Any = v.shape[-1] if tokens is None else tokens

    def mean(x: Tensor) -> Tensor:
        if tokens is None:
            return x.mean(-1, keepdim=True)
        return x.sum(-1, keepdim=True) * (1.0 / tokens)

    s = float(sum(x.shape[2] for x in q)) ** -0.5
    q, k = FEATURES[mechanism.query_map](q), FEATURES[mechanism.key_map](k)
    values = v
    if mechanism.has_global_query:
        logits = product(tuple(s * x.mean(-1, keepdim=True) for x in q), k)
        weights = logits.softmax(-1)  # the mean over tokens, not the sum: N is in it
        values = v * weights
    elif mechanism.has_key_softmax:
        k = tuple(x.softmax(-1) for x in k)
    reads = mechanism.reads
    a: Tensor | float = 1.0
    b: Tensor | float = 0.0
    if reads.uses_norm:
        if mechanism.has_global_query:
            norm = tuple(x @ weights.mT for x in k)
        elif mechanism.has_key_softmax:
            norm = tuple(x.sum(-1, keepdim=True) for x in k)
        else:
            norm = tuple(map(mean, k))
        a, b = reads.factors(product(norm, q), s, length)
    if angles is not None:
        place = encode if mechanism.positions == "cosine" else rotate
        q, k = place(q, angles), place(k, angles)
    out: Tensor | None = None
    for x, y in zip(q, k, strict=True):
        state = values @ y.mT
        if not mechanism.has_key_softmax:
            state = state * (1.0 / length)
        if head_scale is not None:
            state = state * head_scale[:, None, None]
        read = state @ x
        out = read if out is None else out + read
    assert out is not None
    if not isinstance(a, float) or a != 1.0:
        out = out * a
    return out + b * mean(v) if reads.uses_mean else out


def softmax_attention(q: Parts, k: Parts, v: Tensor, angles: Angles | None) -> Tensor:
    """softmax(s q^T k) over the keys on heads [B, h, D, N], as `linear_attention`."""
    s = float(sum(x.shape[2] for x in q)) ** -0.5
    q = tuple(x * s for x in q)
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    # Two sums of half the channels would be a sum of N x N more.
    whole_q, whole_k = torch.cat(q, dim=2), torch.cat(k, dim=2)
    return v @ (whole_q.mT @ whole_k).softmax(-1).mT


def attention(
    q: Parts, k: Parts, v: Tensor, name: str, angles: Angles | None = None,
    head_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention or a linear mechanism by its name; as `linear_attention`."""
    if name == "softmax":
        return softmax_attention(q, k, v, angles)
    return linear_attention(q, k, v, MECHANISMS[name], angles, head_scale)
