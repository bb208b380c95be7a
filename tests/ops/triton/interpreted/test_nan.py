"""NaN and infinity go through the kernels as through the formula: a diverging run shows."""

from __future__ import annotations

import pytest
import torch

from tests.ops.inputs import attend, make_inputs
from tests.ops.triton.cases import many_splits, run
from tests.ops.triton.gpu_arithmetic import maximum_of_a_gpu
from tests.pairwise import pairwise
from vitlinear import ops

PLACES = {"query": 0, "key": 1, "value": 2, "gate": 3, "lepe": 4, "gradient": None}


@pytest.fixture(autouse=True)
def maximum(monkeypatch):
    maximum_of_a_gpu(monkeypatch)


@pairwise(
    every=2,
    mechanism=ops.MECHANISMS,
    place=PLACES,
    splits=[False, True],
    dtype=[torch.float32, torch.float16, torch.bfloat16],
)
def test_nan_where_the_formula_has_it(mechanism, place, splits, dtype, monkeypatch):
    if splits:
        many_splits(monkeypatch)
    inputs = make_inputs(
        grid=(5, 9), dim=16, batch=2, heads=1, dtype=dtype, epilogue=("lepe", "gate")
    )
    projection, grad = inputs.projection.detach().clone(), inputs.grad.clone()
    spoilt = grad if PLACES[place] is None else projection[:, :, PLACES[place]]
    spoilt[1, 7, 0, 3] = torch.nan  # of one sample, one token, one channel
    inputs = inputs._replace(projection=projection.requires_grad_(), grad=grad)
    out = attend(mechanism, inputs, "eager")
    (expected,) = torch.autograd.grad(out, inputs.projection, inputs.grad)
    fused, found = run(mechanism, inputs)
    assert torch.equal(fused.isnan(), out.isnan())
    for part in range(5):
        assert torch.equal(found[:, :, part].isnan(), expected[:, :, part].isnan()), part
    assert not fused[0].isnan().any() and not found[0].isnan().any()
