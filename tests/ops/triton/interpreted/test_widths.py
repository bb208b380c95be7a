"""Positions of the full width, values of another width than queries, and learned powers."""

from __future__ import annotations

import pytest
import torch

from tests.ops.inputs import make_inputs, powers_of
from tests.ops.triton.cases import error, many_splits
from vitlinear import ops
from vitlinear.ops.terms import Terms
from vitlinear.ops.triton import calls, launch


def compare(mechanism, projection, v, grad, options, wanted):
    """Outputs and gradients of the kernels against the eager formula in float64."""
    q, k, *_ = projection.unbind(2)
    out = ops.linear_attention(q, k, v, mechanism=mechanism, **options, backend="triton")
    found = torch.autograd.grad(out, wanted, grad)

    wide = {x: x.detach().double().requires_grad_(x.requires_grad) for x in (projection, v)}
    wide |= {x: x.detach().double().requires_grad_() for x in wanted if x not in wide}

    def double(x):
        if isinstance(x, ops.RotaryTables):
            return ops.RotaryTables(*(table.double() for table in x))
        if not isinstance(x, torch.Tensor) or x.dtype == torch.bool:
            return x
        return wide[x] if x in wide else x.detach().double()

    q, k, *_ = wide[projection].unbind(2)
    options = {name: double(x) for name, x in options.items()}
    exact = ops.linear_attention(q, k, wide[v], mechanism=mechanism, **options, backend="eager")
    expected = torch.autograd.grad(exact, [wide[x] for x in wanted], grad.double())
    assert out.shape == v.shape and error(out, exact) < 3e-6
    for actual, gradient in zip(found, expected, strict=True):
        assert error(actual, gradient) < 3e-6


@pytest.mark.parametrize(
    "mechanism, heads, dim, splits",
    [("elu", 2, 20, True), ("elu", 3, 8, False), ("rala", 2, 8, False), ("nala", 3, 12, True)],
)
def test_full_width_positions(mechanism, heads, dim, splits, monkeypatch):
    if splits:
        many_splits(monkeypatch)
    inputs = make_inputs(grid=(5, 9), heads=heads, dim=dim, batch=1, dtype=torch.float32)
    options = {"rotary": ops.full_width_rotary_tables(5, 9, heads * dim)}
    projection = inputs.projection.detach()
    v = projection[:, :, 2].clone().requires_grad_()
    projection.requires_grad_()
    compare(mechanism, projection, v, inputs.grad, options, (projection, v))


@pytest.mark.parametrize(
    "mechanism, width, splits",
    [
        ("rala", 40, True), ("mala", 6, True), ("inline", 40, False), ("lightnet", 6, False),
        ("identity", 40, True), ("pola", 6, False), ("pola", 40, True),
    ],
)  # fmt: skip
def test_values_of_another_width(mechanism, width, splits, monkeypatch):
    if splits:
        many_splits(monkeypatch)
    inputs = make_inputs(grid=(4, 9), dim=12, batch=2, heads=1, dtype=torch.float32, mask=True)
    generator = torch.Generator().manual_seed(1)
    v, lepe, gate, grad = torch.randn(4, 2, 36, 1, width, generator=generator).unbind(0)
    options = {**inputs.terms(mechanism)._asdict(), "lepe": lepe, "gate": gate}
    wanted = [x.requires_grad_() for x in (v, lepe, gate)]
    options["head_scale"] = torch.tensor([-1.5])
    compare(mechanism, inputs.projection, v, grad, options, (inputs.projection, *wanted))


@pytest.mark.parametrize(
    "largest, splits, dtype",
    [
        (128 * 128, False, torch.bfloat16), (1024, True, torch.float32),
        (512, False, torch.float32), (128 * 128, True, torch.float32),
    ],
    ids=["whole", "halves in splits", "quarters", "splits"],
)  # fmt: skip
def test_gradients_of_powers(largest, splits, dtype, monkeypatch):
    """Of both passes, all splits and all slices; powers may be of another type than queries."""
    from vitlinear.ops.triton import calls, plan

    monkeypatch.setattr(plan, "LARGEST_STATE", largest)
    monkeypatch.setattr(calls, "_prepared", {})
    if splits:
        many_splits(monkeypatch)
    inputs = make_inputs(
        grid=(4, 9), dim=20, batch=1, dtype=torch.float32, mask=True, epilogue=("lepe", "gate")
    )
    powers = powers_of(inputs.projection).to(dtype).requires_grad_()
    scale = torch.tensor([-1.5, 0.5], requires_grad=True)
    lepe, gate = (x.detach() for x in inputs.epilogue_terms())
    projection = inputs.projection.detach()
    v = projection[:, :, 2].clone().requires_grad_()
    options = {
        "key_padding_mask": inputs.mask, "powers": powers, "head_scale": scale,
        "lepe": lepe, "gate": gate,
    }  # fmt: skip
    wanted = (projection.requires_grad_(), v, scale)
    compare("pola", projection, v, inputs.grad, options, wanted)
    q, k, *_ = projection.unbind(2)
    grads = [
        torch.autograd.grad(
            ops.linear_attention(q, k, v, mechanism="pola", **options, backend=backend),
            powers,
            inputs.grad,
        )[0]
        for backend in ("triton", "eager")
    ]
    assert grads[0].dtype == dtype
    assert error(grads[0], grads[1]) < (3e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("mechanism", ["mala", "lightnet"])
def test_tables_in_float16(mechanism):
    """In bfloat16 kernels read tables in half precision: those of layers, others after rounding."""
    inputs = make_inputs(grid=(3, 5), dim=8, dtype=torch.bfloat16)
    make = ops.lrpe_tables if mechanism == "lightnet" else ops.rotary_tables
    half = make(3, 5, 8, dtype=torch.float16)
    q, k, v, _ = inputs.projection.unbind(2)
    call = calls.prepared(q, v, ops.get_mechanism(mechanism), Terms(half))
    rows, cols, _ = launch.Extras.of(Terms(half), call).tables
    assert rows is half.rows and cols is half.cols
    results = []
    for rotary in (half, make(3, 5, 8)):
        out = ops.linear_attention(q, k, v, mechanism=mechanism, rotary=rotary, backend="triton")
        (grad,) = torch.autograd.grad(out, inputs.projection, inputs.grad, retain_graph=True)
        results.append((out, grad))
    assert all(map(torch.equal, *results))
    exact = make_inputs(grid=(3, 5), dim=8, dtype=torch.float32)
    q, k, v, _ = exact.projection.detach().unbind(2)
    found, expected = (
        ops.linear_attention(q, k, v, mechanism=mechanism, rotary=half, backend=backend)
        for backend in ("triton", "eager")
    )
    assert error(found, expected) < 3e-6
