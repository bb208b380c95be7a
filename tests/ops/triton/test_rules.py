"""Rules that kernels for everyone keep: nothing that Triton removes, no grid that is too large."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import vitlinear  # noqa: E402
from vitlinear import ops  # noqa: E402
from vitlinear.ops.terms import Terms  # noqa: E402
from vitlinear.ops.triton import calls  # noqa: E402
from vitlinear.ops.triton.plan import make_plan  # noqa: E402

LARGEST_GRID = (2**31 - 1, 65535)  # of CUDA, programs along x and along y


def test_no_block_pointers():
    """Triton has them no more from 3.7 on."""
    for path in Path(vitlinear.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "attr", getattr(node, "id", ""))
            assert name not in ("make_block_ptr", "advance"), path


@pytest.mark.parametrize("mechanism", ops.MECHANISMS)
@pytest.mark.parametrize("dim", [8, 64, 128])
def test_grids(mechanism, dim, monkeypatch):
    monkeypatch.setattr(calls, "processors", lambda device: 1024)
    monkeypatch.setattr("vitlinear.ops.triton.plan.INTERPRETING", True)
    row = ops.get_mechanism(mechanism)
    plan = make_plan(row, torch.float16, dim, Terms())
    for batch, length, heads in [(1, 2**26, 1), (2**15, 1, 2**10), (1, 49, 1), (3, 2**20, 7)]:
        shape = torch.Size((batch, length, heads, dim))
        call = calls.Call(row, shape, torch.float16, torch.device("cpu"), plan)
        for part in call.slices:
            launches = [x for x in vars(part).values() if isinstance(x, calls.Launch)]
            assert launches
            merges = [merge.keywords for merge in part.merge_of.values()]
            sums = [part.sum_features.keywords, part.sum_statistics.keywords]
            for options in [*(x._constants for x in launches), *merges, *sums]:
                grid = options["grid"]
                assert all(0 < n <= most for n, most in zip(grid, LARGEST_GRID, strict=True))
