"""Programs that take several short maps, one after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops.inputs import make_inputs
from tests.ops.triton.cases import check_exactness
from vitlinear import ops
from vitlinear.ops.terms import Terms
from vitlinear.ops.triton import calls
from vitlinear.ops.triton.plan import make_plan

BATCH, HEADS = 1, 5  # more maps than the interpreter's one processor has programs


@pytest.fixture
def taken(monkeypatch):
    """The kernels that take several maps: name, lanes for tokens, maps of a program."""
    monkeypatch.setattr(calls, "_prepared", {})
    taken = []
    launch = calls.Launch

    def counted(kernel, grid, plan, kind, **constants):
        if plan.window:
            taken.append((kernel.__name__, plan.window, -(-BATCH * HEADS // grid[0])))
        return launch(kernel, grid, plan, kind, **constants)

    monkeypatch.setattr(calls, "Launch", counted)
    return taken


@pytest.mark.parametrize("mechanism", [name for name in ops.MECHANISMS if name != "pola"])
@pytest.mark.parametrize("grid", [pytest.param((7, 7), marks=pytest.mark.nightly), (2, 7)], ids=str)
def test_forward(mechanism, grid, taken):
    inputs = make_inputs(
        grid=grid, dim=16, batch=BATCH, heads=HEADS, dtype=torch.float32, epilogue=("lepe", "gate")
    )
    check_exactness(mechanism, inputs)
    name, lanes, maps = taken[0]
    assert name == "forward_kernel" and lanes == (64 if grid == (7, 7) else 16) and maps > 1


@pytest.mark.parametrize("mechanism", ["inline", "identity", "lightnet"])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("grid", [(7, 7), pytest.param((5, 5), marks=pytest.mark.nightly)], ids=str)
def test_backward(mechanism, mask, grid, taken):
    inputs = make_inputs(
        grid=grid, dim=16, batch=BATCH, heads=HEADS, dtype=torch.float32, mask=mask,
        rotary=False,
    )  # fmt: skip
    check_exactness(mechanism, inputs)
    assert [name for name, *_ in taken] == ["forward_kernel", "backward_kernel"]
    assert all(maps > 1 for _, _, maps in taken)


@pytest.mark.parametrize(
    ("slots", "at_once", "programs"),
    [(1, 264, 1), (264, 264, 264), (265, 264, 133), (12288, 264, 262), (0, 264, 0)],
)
def test_programs_share_the_maps_evenly(slots, at_once, programs):
    assert calls.programs_of_windows(slots, at_once) == programs


@pytest.mark.parametrize(
    ("mechanism", "dim", "length", "terms", "forward", "backward"),
    [
        ("inline", 32, 49, Terms(), 64, 64),
        ("inline", 32, 17, Terms(), 32, 32),
        ("inline", 32, 65, Terms(), 0, 0),
        ("inline", 24, 49, Terms(), 0, 0),
        ("inline", 32, 49, Terms(gate=torch.ones(1)), 64, 0),
        ("elu", 32, 49, Terms(), 64, 0),
        ("mala", 64, 49, Terms(), 0, 0),
        ("pola", 16, 49, Terms(), 0, 0),
    ],
)
def test_who_takes_several(mechanism, dim, length, terms, forward, backward):
    plan = make_plan(ops.get_mechanism(mechanism), torch.bfloat16, dim, terms)
    assert plan.of_windows(length, backward=False).window == forward
    assert plan.of_windows(length, backward=True).window == backward
    in_tf32 = replace(plan, sums="tf32")  # as float16 has them on a GPU
    assert in_tf32.of_windows(length, backward=False).window == forward
    assert in_tf32.of_windows(length, backward=True).window == 0
