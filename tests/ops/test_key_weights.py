"""Weights of keys that the caller gives: one for each token and head, or one for each feature."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.func import grad, vmap

from tests.golden import relative_error
from tests.ops.checks import each_check
from tests.ops.inputs import BACKENDS, attend, make_inputs, operator_arguments, weights_of
from tests.pairwise import pairwise
from vitlinear import ops
from vitlinear.layers import check_attn_type
from vitlinear.ops.mechanisms import MIXER_ROWS, Mechanism

ROWS = [name for name, row in MIXER_ROWS.items() if row.takes_key_weights]
each_row = pytest.mark.parametrize("row", ROWS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def with_weights(row, *, positive=True, **kwargs):
    """Inputs whose products of queries and keys are positive, with weights that want a gradient."""
    inputs = make_inputs(**kwargs)
    if positive:
        inputs = inputs._replace(projection=inputs.projection.detach().abs().requires_grad_())
    weights = weights_of(inputs.projection, row).to(inputs.projection.dtype)
    return inputs._replace(key_weights=weights.requires_grad_())


def compared(row, inputs, backend, limit=1e-12):
    """Output and gradients against the definition."""
    wanted = (inputs.projection, inputs.key_weights)
    out, expected = attend(row, inputs, backend), attend(row, inputs, "naive")
    found = torch.autograd.grad(out, wanted, inputs.grad)
    exact = torch.autograd.grad(expected, wanted, inputs.grad)
    for actual, right in zip((out, *found), (expected, *exact), strict=True):
        assert relative_error(actual, right) < limit
    return found


@pytest.mark.quick
@each_row
@each_backend
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "padded"])
def test_gradient_of_weights(row, backend, mask):
    """With positions and an epilogue; what stands in padding has none."""
    inputs = with_weights(row, mask=mask, epilogue=("lepe", "gate"))
    _, of_weights = compared(row, inputs, backend)
    assert not mask or not of_weights[inputs.mask].any()


@each_backend
@pytest.mark.parametrize("read_out", ["normalised", "magnitude-aware", "injective", "clamped"])
@pytest.mark.parametrize("kind", ["given", "gates"])
def test_any_read_out(read_out, kind, backend, monkeypatch):
    """Weights are in the normaliser, and not in the mean of the values; features may be wide."""
    name = f"{kind} {read_out}"  # calls are kept by name
    row = Mechanism(name, "softmax-halves", "softmax-halves", kind, read_out)
    monkeypatch.setitem(MIXER_ROWS, name, row)
    compared(name, with_weights(name, mask=True), backend)


@pytest.mark.parametrize("kind", ["given", "gates"])
def test_weights_of_one_change_nothing(kind, monkeypatch):
    monkeypatch.setitem(MIXER_ROWS, kind, Mechanism(kind, "elu+1", "elu+1", kind))
    inputs = make_inputs(mask=True)
    inputs = inputs._replace(key_weights=torch.ones_like(weights_of(inputs.projection, kind)))
    torch.testing.assert_close(
        attend(kind, inputs, "eager"), attend("elu", inputs, "eager"), rtol=1e-12, atol=1e-12
    )


@each_row
@each_backend
def test_gradcheck(row, backend):
    inputs = with_weights(row, grid=(2, 3), dim=4, mask=True)

    def run(projection, weights):
        return attend(row, inputs._replace(key_weights=weights), backend, projection)

    assert torch.autograd.gradcheck(run, (inputs.projection, inputs.key_weights), fast_mode=True)


@each_row
def test_higher_derivatives_and_transforms(row):
    """The eager formula has second and forward-mode derivatives, and runs under vmap."""
    inputs = with_weights(row, grid=(2, 2), dim=4, batch=1, heads=1)
    q, k, v, _ = inputs.projection.detach().unbind(2)
    weights = inputs.key_weights.detach()

    def total(w):
        return ops.linear_attention(q, k, v, mechanism=row, key_weights=w).sin().sum()

    assert torch.autograd.gradgradcheck(total, inputs.key_weights)
    assert torch.autograd.gradcheck(total, inputs.key_weights, check_forward_ad=True)
    some = torch.stack((weights, 0.5 * weights, 0 * weights))
    torch.testing.assert_close(vmap(grad(total))(some), torch.stack([grad(total)(w) for w in some]))


@pairwise(row=ROWS, dtype=[torch.float16, torch.bfloat16, torch.float32], backend=BACKENDS)
def test_weights_of_any_type(row, dtype, backend):
    """Their gradient is of their type, whatever that of the queries."""
    inputs = with_weights(row, dtype=torch.float32)
    weights = inputs.key_weights.detach().to(dtype).requires_grad_()
    out = attend(row, inputs._replace(key_weights=weights), backend)
    (found,) = torch.autograd.grad(out, weights, inputs.grad)
    exact = with_weights(row)
    exact = exact._replace(
        projection=inputs.projection.detach().double(), rotary=ops.rotary_tables(3, 5, 8)
    )
    (expected,) = torch.autograd.grad(
        attend(row, exact, "naive"), exact.key_weights, inputs.grad.double()
    )
    assert found.dtype == dtype and out.dtype == torch.float32
    assert relative_error(found, expected) < {torch.float32: 1e-5}.get(dtype, 5e-3)


@pairwise(row=ROWS, dtype=[torch.float16, torch.bfloat16], backend=BACKENDS)
def test_half_precision(row, dtype, backend):
    """Sums in float32, one rounding of each result."""
    inputs = with_weights(row, grid=(5, 7), dtype=dtype)
    wanted = (inputs.projection, inputs.key_weights)
    out = attend(row, inputs, backend)
    found = torch.autograd.grad(out, wanted, inputs.grad)
    exact = with_weights(row, grid=(5, 7))
    exact = exact._replace(projection=inputs.projection.detach().double().requires_grad_())
    expected = attend(row, exact, "naive")
    right = torch.autograd.grad(
        expected, (exact.projection, exact.key_weights), inputs.grad.double()
    )
    for actual, value in zip((out, *found), (expected, *right), strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, value) < {torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


CASES = ["zero weights", "huge weights", "one weight", "zeros", "padding", "large"]


def hard_case(row, case, dtype):
    """Inputs that overflow or divide by zero where something is done in the wrong order."""
    inputs = with_weights(row, grid=(5, 6), dtype=dtype, mask=case == "padding")
    projection, weights = inputs.projection.detach(), inputs.key_weights.detach()
    if case == "zero weights":
        weights.zero_()
    elif case == "huge weights":
        weights *= 30000 if dtype == torch.float16 else 1e12
    elif case == "one weight":
        weights[:, 1:] = 0
    elif case == "zeros":
        projection.zero_()
    elif case == "padding":
        inputs.mask[0] = True
        for x in (projection, weights):
            x[inputs.mask] = torch.nan
    elif case == "large":
        projection[:, :, :2] *= 1e4
    return inputs._replace(
        projection=projection.requires_grad_(), key_weights=weights.requires_grad_()
    )


@pairwise(
    case=CASES, dtype=[torch.float16, torch.bfloat16, torch.float32], row=ROWS, backend=BACKENDS
)
def test_finite(case, dtype, row, backend):
    inputs = hard_case(row, case, dtype)
    wanted = (inputs.projection, inputs.key_weights)
    out = attend(row, inputs, backend)
    grads = torch.autograd.grad(out, wanted, inputs.grad)
    assert all(x.isfinite().all() for x in (out, *grads))
    if case in ("zero weights", "zeros"):
        assert not out.any() or row.endswith(("elu", "elu_sum")) and case == "zeros"
    if case == "padding":
        assert not any(x[inputs.mask].any() for x in (out, *grads))


@each_check(
    "row, mask, state",
    product(["weighted_identity", "gated_elu"], [False, True], [False, True]),
    traced=[("weighted_identity", True, False), ("gated_elu", False, True)],
)
def test_opcheck(row, mask, state, checks):
    inputs = with_weights(row, mask=mask, dtype=torch.float32)
    if not state:
        torch.library.opcheck(*operator_arguments(row, inputs), test_utils=checks)
        return
    _, k, v, *_ = inputs.projection.unbind(2)
    torch.library.opcheck(
        torch.ops.vitlinear.linear_attention_state.default,
        (k, v, row, *inputs.rotary, inputs.mask, None, inputs.key_weights),
        test_utils=checks,
    )


@pytest.mark.compile
@each_backend
def test_compile_fullgraph(backend):
    inputs = with_weights("gated_elu", grid=(4, 6), mask=True)

    def run(projection, weights):
        return attend("gated_elu", inputs._replace(key_weights=weights), backend, projection)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    wanted = (inputs.projection, inputs.key_weights)
    out, expected = compiled(*wanted), run(*wanted)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, wanted, inputs.grad),
        torch.autograd.grad(expected, wanted, inputs.grad),
    )


class Weighted(torch.nn.Module):
    """An attention that takes its weights, for exporters."""

    def forward(self, x, weights):
        q, k, v = x.unbind(2)
        return ops.linear_attention(q, k, v, mechanism="weighted_identity", key_weights=weights)


def test_export_any_size():
    batch, length = (torch.export.Dim(name, min=2, max=64) for name in "bn")
    sizes = {0: batch, 1: length}
    program = torch.export.export(
        Weighted(),
        (torch.randn(2, 30, 3, 2, 8), torch.randn(2, 30, 2, 1)),
        dynamic_shapes={"x": sizes, "weights": sizes},
    )
    given = torch.randn(3, 36, 3, 2, 8), torch.randn(3, 36, 2, 1)
    torch.testing.assert_close(program.module()(*given), Weighted()(*given))


def test_autocast_rounds_no_weights():
    inputs = with_weights("weighted_identity", dtype=torch.float32)
    expected = attend("weighted_identity", inputs, "library")
    with torch.autocast("cpu", torch.bfloat16):
        for backend in BACKENDS:
            torch.testing.assert_close(attend("weighted_identity", inputs, backend), expected)


BAD = {
    "mechanism 'gated_elu' needs key_weights, [B, N, h, 8] = (1, 6, 2, 8)": {
        "mechanism": "gated_elu"
    },
    "mechanism 'elu' takes no key_weights": {"key_weights": torch.ones(1, 6, 2, 1)},
    "key_weights must be floating-point and [B, N, h, 1] = (1, 6, 2, 1), got (1, 6, 2)": {
        "mechanism": "weighted_identity",
        "key_weights": torch.ones(1, 6, 2),
    },
    "= (1, 6, 2, 1), got (1, 6, 2, 1) torch.int64": {
        "mechanism": "weighted_identity",
        "key_weights": torch.ones(1, 6, 2, 1, dtype=torch.int64),
    },
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_named(message):
    arguments = dict.fromkeys("qkv", torch.zeros(1, 6, 2, 8)) | BAD[message]
    with pytest.raises(ValueError) as caught:
        ops.linear_attention(**arguments)
    assert message in str(caught.value)
    with pytest.raises(ValueError) as caught:
        ops.linear_attention_state(**{k: v for k, v in arguments.items() if k != "q"})
    assert message in str(caught.value)


@each_row
def test_layers_do_not_take_it(row):
    with pytest.raises(ValueError, match="is a part of attentions by name"):
        check_attn_type(row)
