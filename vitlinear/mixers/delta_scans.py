"""Scans of the delta rule over a map in several directions, in chunks of tokens.

Along a scan, with k of length 1, a step b and a fall f of each channel of the keys::

    S <- diag(exp(-f_t)) S        S <- S + b_t k_t (v_t - S^T k_t)^T        out_t = S^T q_t

In a chunk whose first state is S and whose sums of -f are c_t, steps add k_t u_t^T with
u_t = b_t (v_t - S^T (k_t exp(c_t)) - sum_(s<t) (k_t exp(c_t - c_s)) . k_s u_s): a triangular
system.
Tokens without a step and a fall change nothing: padding needs no other care.

Source: arXiv:2406.06484 and, with falls, arXiv:2510.26692; derived from the rule above.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from .grid import Grid

CHUNK = 64
CHUNK_WITH_FALLS = 16  # exp(5 * 16 / 2), from the middle of a chunk, is far from overflow


def directional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    falls: Tensor | None,
    grid: Grid,
    count: int,
    half: torch.dtype | None = None,
) -> Tensor:
    """Mean of the outputs of scans: along rows and back, and along columns and back.

    Tokens before the map stand first in a scan, and last in the one that comes back.

    Args:
        q: Queries, [B, N, h, D].
        k: Keys, of length 1.
        v: Values.
        beta: Steps, [B, N, h, 1], 0 for padding.
        falls: f, [B, N, h, D], from 0 to 5 and 0 for padding; None for none.
        grid: Where the tokens stand.
        count: Scans, 2 or 4.
        half: Half type of the layer, in which flash-linear-attention may run on a GPU; None to stay
            in the type of q.

    Returns:
        [B, N, h, D].
    """
    given = [q, k, v, beta] if falls is None else [q, k, v, beta, falls]
    grid.needs_whole_map("a scan of the delta rule")
    lines = [torch.cat([order(x, grid, i) for i in range(count)]) for x in given]
    if half is not None and runs_fused(q, half):
        out = fused_scan()(half, *lines).to(q.dtype)
    else:
        out = scan(*lines)
    outs = [restore(x, grid, i) for i, x in enumerate(out.chunk(count))]
    return torch.stack(outs).mean(0)


def order(x: Tensor, grid: Grid, direction: int) -> Tensor:
    """Tokens [B, N, ...] in the order of a scan: rows, rows back, columns, columns back."""
    if direction >= 2:
        prefix, tokens = grid.split(x)
        x = torch.cat((prefix, tokens.transpose(1, 2).flatten(1, 2)), dim=1)
    return x.flip(1) if direction % 2 else x


def restore(x: Tensor, grid: Grid, direction: int) -> Tensor:
    """The inverse of `order`."""
    x = x.flip(1) if direction % 2 else x
    if direction >= 2:
        turned = grid._replace(height=grid.width, width=grid.height)
        prefix, tokens = turned.split(x)
        x = torch.cat((prefix, tokens.transpose(1, 2).flatten(1, 2)), dim=1)
    return x


def scan(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, falls: Tensor | None = None) -> Tensor:
    """One scan over tokens [B, N, h, D] in their order; arguments as `directional`."""
    length = q.shape[1]
    size = min(CHUNK if falls is None else CHUNK_WITH_FALLS, length)
    count = -(-length // size)

    def chunks(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 0, count * size - length))
        return x.unflatten(1, (count, size)).permute(1, 0, 3, 2, 4)  # [chunks, B, h, size, D]

    q, k, v, beta = chunks(q), chunks(k), chunks(v), chunks(beta)
    state = v.new_zeros(*v.shape[1:3], k.shape[-1], v.shape[-1])
    query, key, other, ending, kept = q, k, k, k, None
    if falls is not None:
        total = -chunks(falls).cumsum(-2)
        middle, end = total[..., size // 2, None, :], total[..., -1:, :]
        # exp(c_t - c_s) as the product of two factors, each from the middle of the chunk.
        ahead, behind = (total - middle).exp(), (middle - total).exp()
        within_query, within_key, other = q * ahead, k * ahead, k * behind
        ending, kept = k * (end - total).exp(), end.exp().transpose(-1, -2)
        query, key = q * total.exp(), k * total.exp()
    else:
        within_query, within_key = q, k
    before = torch.ones(size, size, dtype=torch.bool, device=q.device).tril(-1)
    system = beta * (within_key @ other.transpose(-1, -2)).masked_fill(~before, 0)
    system = system + torch.eye(size, dtype=q.dtype, device=q.device)
    right = beta * torch.cat((v, key), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, reads = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    later = before.T  # s > t
    similar = (within_query @ other.transpose(-1, -2)).masked_fill(later, 0)
    states, steps = [], []
    # Indices would make a gradient of all chunks for each chunk: time quadratic in N.
    parts = zip(values.unbind(), reads.unbind(), ending.mT.unbind(), strict=True)
    falling = [None] * count if kept is None else kept.unbind()
    for (value, read, end_keys), keep in zip(parts, falling, strict=True):
        added = value - read @ state
        states.append(state)
        steps.append(added)
        state = (state if keep is None else keep * state) + end_keys @ added
    out = query @ torch.stack(states) + similar @ torch.stack(steps)
    out = out.permute(1, 0, 3, 2, 4).flatten(1, 2)
    return out[:, :length]


def runs_fused(q: Tensor, half: torch.dtype) -> bool:
    """Whether the kernels of flash-linear-attention take a layer of this half type.

    They have no second derivative, and programs that are compiled do not look into them.
    """
    return q.is_cuda and not torch.compiler.is_compiling() and find_spec("fla") is not None


@functools.cache
def fused_scan() -> Callable[..., Tensor]:
    """The scans of flash-linear-attention: takes the half type to run in, then as `scan`."""
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.kda import chunk_kda

    def fused(
        half: torch.dtype,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        falls: Tensor | None = None,
    ) -> Tensor:
        q, k, v, beta = (x.to(half).contiguous() for x in (q, k, v, beta.squeeze(-1)))
        # Queries come scaled, keys of length 1: the kernels are to do neither.
        if falls is None:
            out, _ = chunk_delta_rule(q=q, k=k, v=v, beta=beta, scale=1.0)
        else:
            out, _ = chunk_kda(q=q, k=k, v=v, g=-falls.contiguous(), beta=beta, scale=1.0)
        return out

    return fused


def naive_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    falls: Tensor | None,
    grid: Grid,
    count: int,
) -> Tensor:
    """`directional` token by token."""
    outs = []
    for direction in range(count):
        number = order(torch.arange(q.shape[1])[None, :, None], grid, direction).flatten()
        state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        out = [v[:, 0]] * q.shape[1]
        for t in number.tolist():
            if falls is not None:
                state = state * (-falls[:, t]).exp().unsqueeze(-1)
            error = v[:, t] - torch.einsum("bhd,bhde->bhe", k[:, t], state)
            state = state + torch.einsum("bhd,bhe->bhde", k[:, t], beta[:, t] * error)
            out[t] = torch.einsum("bhd,bhde->bhe", q[:, t], state)
        outs.append(torch.stack(out, dim=1))
    return sum(outs[1:], outs[0]) / count
