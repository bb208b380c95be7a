"""Exchanges between processes: rows of maps, and sums. All of them have derivatives.

The exchanges are registered operators, so that compilers take them as they are. Every process takes
part in each of them, also with nothing to send, and its result is always part of what comes out:
backward passes then exchange in the same order everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.library import custom_op

Range = tuple[int, int]

# Groups by their names: operators take no groups as arguments.
_GROUPS: dict[str, distributed.ProcessGroup] = {}


def register_group(group: distributed.ProcessGroup) -> str:
    """The name by which operators find a group."""
    _GROUPS[group.group_name] = group
    return group.group_name


@custom_op("vitlinear::exchange_rows", mutates_args=())
def exchange_op(x: Tensor, sent: Sequence[int], received: Sequence[int], group: str) -> Tensor:
    """All-to-all of pieces of a row of numbers.

    Args:
        x: What is sent, the pieces for each process one after the other, [sum(sent)].
        sent: Numbers for each process.
        received: Numbers from each process.
        group: Name of the group.

    Returns:
        [sum(received)].
    """
    out = x.new_empty(sum(received))
    distributed.all_to_all_single(
        out, x.contiguous(), list(received), list(sent), group=_GROUPS[group]
    )
    return out


@exchange_op.register_fake
def _(x: Tensor, sent: Sequence[int], received: Sequence[int], group: str) -> Tensor:
    return x.new_empty(sum(received))


def _keep_exchange(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.sent, ctx.received, ctx.group = inputs


def _exchange_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    back: Tensor = torch.ops.vitlinear.exchange_rows(grad, ctx.received, ctx.sent, ctx.group)
    return back, None, None, None


exchange_op.register_autograd(_exchange_back, setup_context=_keep_exchange)


@custom_op("vitlinear::total_rows", mutates_args=())
def total_op(x: Tensor, group: str) -> Tensor:
    """The sum of the tensors of all processes of a group."""
    out = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(out, group=_GROUPS[group])
    return out


@total_op.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_total(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


def _total_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.vitlinear.total_rows(grad, ctx.group), None


total_op.register_autograd(_total_back, setup_context=_keep_total)


def _common(a: Range, b: Range) -> int:
    """Length of what two ranges have in common."""
    return max(min(a[1], b[1]) - max(a[0], b[0]), 0)


def fetch_parts(
    x: Tensor, dim: int, bounds: Sequence[Range], need: Sequence[Range], rank: int, group: str
) -> list[Tensor]:
    """Own rows -> of every process, from the top, those of its rows that this one needs.

    The own ones alone, if no process needs rows of another. Backward sends gradients back, and adds
    them.

    Args:
        x: The own rows along ``dim``, those of ``bounds[rank]``.
        dim: Axis of the rows.
        bounds: Rows of each process, from the top, without gaps.
        need: Rows that each process wants, inside of those of all.
        rank: Number of this process in the group.
        group: Name of the group.
    """
    count = len(bounds)
    own = bounds[rank]
    first, last = (min(max(row, own[0]), own[1]) for row in need[rank])
    kept = x if (first, last) == own else x.narrow(dim, first - own[0], max(last - first, 0))
    others = [(a, b) for a in range(count) for b in range(count) if a != b]
    if not any(_common(bounds[a], need[b]) for a, b in others):  # all processes see that alike
        return [kept]
    row = math.prod([*x.shape[:dim], *x.shape[dim + 1 :]])
    pieces, sent, received = [], [], []
    for other in range(count):
        sends = 0 if other == rank else _common(own, need[other])
        if sends:
            pieces.append(x.narrow(dim, max(need[other][0], own[0]) - own[0], sends).reshape(-1))
        sent.append(sends * row)
        received.append(0 if other == rank else _common(bounds[other], need[rank]) * row)
    flat = torch.cat(pieces) if pieces else x.narrow(dim, 0, 0).reshape(-1)
    came = exchange_op(flat, sent, received, group)
    shape = list(x.shape)

    def rows_of(numbers: Tensor) -> Tensor:
        return numbers.reshape([*shape[:dim], numbers.shape[0] // max(row, 1), *shape[dim + 1 :]])

    parts = [rows_of(piece) for piece in came.split(received)]
    if kept.shape[dim]:
        parts[rank] = kept
    return parts


def fetch(
    x: Tensor, dim: int, bounds: Sequence[Range], need: Sequence[Range], rank: int, group: str
) -> Tensor:
    """Own rows -> the rows of ``need[rank]``, whoever has them; arguments as `fetch_parts`."""
    parts = fetch_parts(x, dim, bounds, need, rank, group)
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def total(x: Tensor, group: str) -> Tensor:
    """The sum of the tensors of all processes; backward takes the sum of their gradients."""
    return total_op(x, group)


def gather(x: Tensor, count: int, group: str) -> Tensor:
    """The tensors of all ``count`` processes, which have one shape, along a new first axis."""
    size = x.numel()
    sent = [size] * count
    flat = x.reshape(-1).repeat(count)
    return exchange_op(flat, sent, sent, group).reshape(count, *x.shape)
