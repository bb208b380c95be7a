"""Weights of keys that the caller gives, by the kernels, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from tests.ops.inputs import attend, double, operator_arguments
from tests.ops.test_key_weights import CASES, ROWS, hard_case, with_weights
from tests.ops.triton.cases import ROUNDING, error, many_splits
from tests.pairwise import pairwise
from vitlinear import ops
from vitlinear.ops.triton import calls, plan


def gradients(row, inputs, backend):
    """The output, and gradients of the projection and of the weights."""
    wanted = (inputs.projection, inputs.key_weights)
    out = attend(row, inputs, backend)
    return out, *torch.autograd.grad(out, wanted, inputs.grad)


def wide(inputs):
    """The same in float64."""
    projection, weights = (
        x.detach().double().requires_grad_() for x in (inputs.projection, inputs.key_weights)
    )
    return inputs._replace(
        projection=projection, key_weights=weights, rotary=double(inputs.rotary),
        grad=inputs.grad.double(),
    )  # fmt: skip


def check(row, inputs):
    """Results may err twice as much as those of the formula in the same type."""
    exact = gradients(row, wide(inputs), "eager")
    plain = gradients(row, inputs, "eager")
    for actual, formula, right in zip(gradients(row, inputs, "triton"), plain, exact, strict=True):
        assert actual.dtype == formula.dtype and actual.shape == formula.shape
        assert error(actual, right) <= 2 * error(formula, right) + ROUNDING[inputs.grad.dtype]


@pairwise(
    row=ROWS, dtype=[torch.float32, torch.float16, torch.bfloat16],
    way=["splits", "one kernel", "slices"], mask=[False, True], every=4,
)  # fmt: skip
def test_gradients(row, dtype, way, mask, monkeypatch):
    monkeypatch.setattr(calls, "_prepared", {})
    if way == "splits":
        many_splits(monkeypatch)
    elif way == "slices":
        monkeypatch.setattr(plan, "LARGEST_STATE", 512)
    check(row, with_weights(row, grid=(5, 9), dim=20, batch=1, dtype=dtype, mask=mask))


@pytest.mark.parametrize(
    ("row", "layout"), [("gated_elu", "sliced"), ("weighted_identity", "turned")]
)
def test_weights_may_lie_anywhere(row, layout):
    inputs = with_weights(row, grid=(3, 5), dtype=torch.float32)
    weights = inputs.key_weights.detach()
    if layout == "sliced":
        weights = torch.stack((weights, weights), dim=2).unbind(2)[0]
    else:
        weights = weights.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    check(row, inputs._replace(key_weights=weights.requires_grad_()))


@pytest.mark.parametrize("row", ["weighted_identity", "gated_identity"])
def test_windows(row, monkeypatch):
    """Programs that take several short maps, forward and backward."""
    monkeypatch.setattr(calls, "_prepared", {})
    inputs = with_weights(
        row, grid=(2, 7), dim=16, batch=1, heads=5, dtype=torch.float32, rotary=False, mask=True
    )
    check(row, inputs)
    (call,) = calls._prepared.values()
    (part,) = call.slices
    assert part.forward._plan.window and part.backward._plan.window


@pairwise(row=ROWS, splits=[False, True], every=4)
def test_two_steps(row, splits, monkeypatch):
    monkeypatch.setattr(calls, "_prepared", {})
    if splits:
        many_splits(monkeypatch)
    inputs = with_weights(row, grid=(5, 9), dtype=torch.float32, mask=True)

    def run(inputs, backend):
        q, k, v, _ = inputs.projection.unbind(2)
        options = {"rotary": inputs.rotary, "key_padding_mask": inputs.mask, "backend": backend}
        state = ops.linear_attention_state(
            k, v, mechanism=row, key_weights=inputs.key_weights, **options
        )
        out = ops.read_linear_attention_state(q, state, mechanism=row, **options)
        wanted = (inputs.projection, inputs.key_weights)
        return out, *torch.autograd.grad(out, wanted, inputs.grad)

    plain, exact = run(inputs, "eager"), run(wide(inputs), "eager")
    for actual, formula, right in zip(run(inputs, "triton"), plain, exact, strict=True):
        assert error(actual, right) <= 2 * error(formula, right) + 1e-6


@pairwise(case=CASES, dtype=[torch.float32, torch.float16], row=ROWS, every=4)
def test_finite(case, dtype, row, monkeypatch):
    many_splits(monkeypatch)
    inputs = hard_case(row, case, dtype)
    results = gradients(row, inputs, "triton")
    assert all(x.isfinite().all() for x in results)
    if case == "padding":
        assert not any(x[inputs.mask].any() for x in results)


@pytest.mark.nightly
def test_opcheck():
    inputs = with_weights("gated_elu", mask=True, heads=1, batch=1, dtype=torch.float32)
    operator, arguments = operator_arguments("gated_elu", inputs)
    torch.library.opcheck(operator, (*arguments, "triton"))
