"""Rows fetched from other processes, and sums, against what one process sees."""

from typing import Any

import pytest
import torch
from torch import distributed

from tests.parallel.comparing import mesh_of_all
from vitlinear.parallel import gather_rows, shard_rows, split_rows

pytestmark = pytest.mark.process

# Ranges of ten rows by process: neighbours' rows, all, none, others' alone, own ones in part.
NEEDS = [
    ((0, 5), (3, 8), (6, 10)),
    ((0, 10), (0, 10), (0, 10)),
    ((0, 4), (4, 7), (7, 10)),
    ((4, 10), (0, 0), (0, 2)),
    ((1, 2), (0, 9), (10, 10)),
    ((0, 4), (4, 7), (3, 10)),
]


def _fetched(need: Any) -> tuple[bool, bool]:
    rank = distributed.get_rank()
    rows = split_rows(10, mesh_of_all(), multiple=1, sizes=(4, 3, 3))
    whole = torch.randn(2, 10, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine = whole[:, rows.own.start : rows.own.stop].clone().requires_grad_()
    found = rows.fetch(mine, 1, rows.cuts, need)
    first, last = need[rank]
    forward = torch.equal(found, whole[:, first:last])
    # Everyone's gradient of the row n of what it fetched is n + 1.
    (found * (torch.arange(first, last) + 1.0)[:, None]).sum().backward()
    counts = torch.zeros(10, dtype=torch.float64)
    for a, b in need:
        counts[a:b] += torch.arange(a, b) + 1
    expected = counts[rows.own.start : rows.own.stop, None].expand(2, -1, 3)
    return forward, torch.equal(mine.grad, expected)


@pytest.mark.parametrize("need", NEEDS)
def test_fetch_and_its_derivative(three, need):
    assert three.run(_fetched, need) == [(True, True)] * 3


def _summed() -> tuple[list[float], float, list[float]]:
    rank = distributed.get_rank()
    rows = split_rows(9, mesh_of_all(), multiple=1)
    x = torch.tensor([1.0 + rank], dtype=torch.float64, requires_grad=True)
    a, b = rows.total(x, 2 * x)
    (merged,) = rows.merge((x,), lambda a, b: (torch.maximum(a[0], b[0]),))
    ((a + b) * (rank + 1) + merged).sum().backward()
    return [float(a), float(b)], float(merged), x.grad.tolist()


@pytest.mark.quick("parallel", "rows")
def test_sums_and_their_derivatives(three):
    # (1 + 2 + 3) * (1 + 2), and of the maximum one for each process.
    assert [x[0] for x in three.run(_summed)] == [[6.0, 12.0]] * 3
    assert [x[1] for x in three.run(_summed)] == [3.0] * 3
    assert [x[2] for x in three.run(_summed)] == [[18.0], [18.0], [21.0]]


def _gathered() -> bool:
    images = torch.randn(2, 3, 70, 5, generator=torch.Generator().manual_seed(0))
    shard, rows = shard_rows(images, mesh_of_all(), multiple=8)
    tokens = torch.cat((torch.ones(2, 1, 3), shard.flatten(2).transpose(1, 2)), 1)
    whole = torch.cat((torch.ones(2, 1, 3), images.flatten(2).transpose(1, 2)), 1)
    booleans = rows.gather(shard > 0, 2, [stop - start for start, stop in rows.cuts])
    return (
        torch.equal(gather_rows(shard, rows), images)
        and torch.equal(gather_rows(tokens, rows, prefix=1), whole)
        and torch.equal(booleans, images > 0)
        and [stop - start for start, stop in rows.cuts] == [24, 24, 22]
        and shard_rows(images, mesh_of_all(), multiple=8)[1] is rows
    )


def test_gather_maps_and_tokens(three):
    assert three.run(_gathered) == [True] * 3
