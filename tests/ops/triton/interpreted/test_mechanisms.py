"""Every mechanism in the interpreter, forward and all gradients, against the float64 oracle."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.ops.inputs import make_inputs
from tests.ops.triton.cases import GRIDS, error, many_splits, reference, run
from tests.pairwise import pairwise
from vitlinear import ops

each_mechanism = pytest.mark.parametrize("mechanism", list(ops.MECHANISMS))
FAST = {(1, 8), (17, 20), (65, 20)}
OTHERS = [size for size in itertools.product(GRIDS, (8, 20, 32)) if size not in FAST]
# Each mechanism at every size of the fast ones; the others in turn, each of them by one mechanism
# as a rule and by two in nightly runs.
SIZES = [
    pytest.param(mechanism, *size, marks=pytest.mark.quick if mechanism == "rala" else ())
    for mechanism in ops.MECHANISMS
    for size in sorted(FAST)
] + [
    pytest.param(mechanism, *size, marks=pytest.mark.nightly if turn else ())
    for i, mechanism in enumerate(ops.MECHANISMS)
    for j, size in enumerate(OTHERS)
    for turn in [(i + j) % len(ops.MECHANISMS)]
    if turn in (0, len(ops.MECHANISMS) // 2)
]


def check(mechanism, inputs, layout="projection"):
    expected_out, expected_grad = reference(mechanism, inputs)
    out, grad = run(mechanism, inputs, layout)
    assert out.dtype == inputs.projection.dtype and out.is_contiguous()
    assert error(out, expected_out) < 3e-6
    for part in range(3):
        assert error(grad[:, :, part], expected_grad[:, :, part]) < 3e-6
    assert not grad[:, :, 3].any()


@pytest.mark.parametrize("mechanism, length, dim", SIZES)
def test_one_kernel(mechanism, length, dim):
    check(mechanism, make_inputs(grid=GRIDS[length], dim=dim, batch=1, dtype=torch.float32))


@pytest.mark.parametrize(
    "mechanism, length, dim",
    [
        pytest.param(mechanism, *size, marks=pytest.mark.nightly if (i + j) % 3 else ())
        for i, mechanism in enumerate(ops.MECHANISMS)
        for j, size in enumerate([(63, 20), (65, 32), (196, 8)])
    ],
)
def test_splits(mechanism, length, dim, monkeypatch):
    many_splits(monkeypatch)
    check(mechanism, make_inputs(grid=GRIDS[length], dim=dim, batch=1, dtype=torch.float32))


@pairwise(every=3, mechanism=ops.MECHANISMS, splits=[False, True])
def test_mask_and_head_scale(mechanism, splits, monkeypatch):
    """Padding that is NaN: in pieces, over whole splits, and a whole sample."""
    if splits:
        many_splits(monkeypatch)
    inputs = make_inputs(grid=(7, 10), batch=3, heads=1, dtype=torch.float32, mask=True)
    inputs.mask[1] = True
    inputs.mask[2, 5:69] = True
    scale = torch.tensor([-1.5], requires_grad=True)
    inputs = inputs._replace(head_scale=scale)
    expected = reference(mechanism, inputs)

    def with_grads(projection, backend):
        q, k, v, _ = projection.unbind(2)
        options = {"mechanism": mechanism, **inputs.terms(mechanism)._asdict()}
        out = ops.linear_attention(q, k, v, **options, backend=backend)
        return out, *torch.autograd.grad(out, (projection, scale), inputs.grad)

    spoilt = inputs.projection.masked_fill(inputs.mask[:, :, None, None, None], torch.nan)
    out, grad, grad_scale = with_grads(spoilt, "triton")
    assert error(out, expected[0]) < 3e-6 and error(grad, expected[1]) < 3e-6
    assert not out[1].any() and not grad[1].any()
    *_, wanted = with_grads(inputs.projection, "eager")
    torch.testing.assert_close(grad_scale, wanted, rtol=1e-4, atol=1e-4)


@each_mechanism
def test_without_positions(mechanism):
    check(mechanism, make_inputs(grid=(5, 9), batch=1, dtype=torch.float32, rotary=False))


@pairwise(every=4, mechanism=ops.MECHANISMS, layout=["channels first", "heads first"])
def test_layouts(mechanism, layout):
    check(mechanism, make_inputs(grid=(3, 11), dim=12, dtype=torch.float32), layout)


@pairwise(every=2, mechanism=ops.MECHANISMS, splits=[False, True])
def test_epilogue(mechanism, splits, monkeypatch):
    """(out + lepe) * gate with padding that is NaN, and the gradients of both."""
    if splits:
        many_splits(monkeypatch)
    inputs = make_inputs(
        grid=(5, 9), heads=1, dtype=torch.float32, mask=True, epilogue=("lepe", "gate")
    )
    expected = reference(mechanism, inputs)
    spoilt = inputs.projection.masked_fill(inputs.mask[:, :, None, None, None], torch.nan)
    out, grad = run(mechanism, inputs._replace(projection=spoilt))
    assert error(out, expected[0]) < 3e-6
    for part in range(5):
        assert error(grad[:, :, part], expected[1][:, :, part]) < 3e-6


@pairwise(
    every=4, term=["lepe", "gate"], layout=["channels first", "projection"],
    mechanism=["rala", "mala"],
)  # fmt: skip
def test_half_an_epilogue(mechanism, term, layout, monkeypatch):
    many_splits(monkeypatch)
    inputs = make_inputs(grid=(3, 12), heads=1, batch=1, dtype=torch.float32, epilogue=(term,))
    expected = reference(mechanism, inputs)
    out, grad = run(mechanism, inputs, layout)
    assert error(out, expected[0]) < 3e-6
    for part in range(5):
        assert error(grad[:, :, part], expected[1][:, :, part]) < 3e-6


@pairwise(every=2, mechanism=["nala", "lightnet", "inline", "pola"], splits=[False, True])
def test_states_in_slices(mechanism, splits, monkeypatch):
    """Slices of unequal width, as large states of wide heads are computed in."""
    from vitlinear.ops.triton import plan

    monkeypatch.setattr(plan, "LARGEST_STATE", 512 if mechanism == "inline" else 1024)
    if splits:
        many_splits(monkeypatch)
    scale = torch.tensor([-1.5, 0.5])
    inputs = make_inputs(
        grid=(5, 8), dim=20, batch=1, dtype=torch.float32, mask=True, epilogue=("lepe", "gate")
    )
    inputs = inputs._replace(head_scale=scale.requires_grad_())
    expected = reference(mechanism, inputs)
    out, grad = run(mechanism, inputs)
    assert error(out, expected[0]) < 3e-6
    for part in range(5):
        assert error(grad[:, :, part], expected[1][:, :, part]) < 3e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mechanism", ["nala", "lightnet"])
def test_wide_heads(mechanism, dtype):
    """States of 256 rows."""
    inputs = make_inputs(grid=(3, 13), dim=128, batch=1, heads=1, dtype=dtype)
    expected = reference(mechanism, inputs)
    limit = {torch.float32: 3e-6, torch.float16: 1e-3}[dtype]
    for actual, exact in zip(run(mechanism, inputs), expected, strict=True):
        assert error(actual, exact) < limit
