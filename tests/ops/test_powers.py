"""Learned powers of a feature map, and two reads of one state: what PolaFormer asks for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.golden import relative_error
from tests.ops.checks import each_gradcheck
from tests.ops.inputs import BACKENDS, attend, make_inputs, powers_of
from vitlinear import ops
from vitlinear.ops.features import signed_powers

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def by_hand(q, k, v, p, mask=None):
    """Polarity-aware attention as its paper defines it, token pairs and all, [B, N, h, D]."""
    keep = torch.ones(q.shape[:2], dtype=q.dtype) if mask is None else (~mask).to(q.dtype)
    count = keep.sum(1)[:, None, None, None]
    positive, negative = (lambda x: F.relu(x) ** p), (lambda x: F.relu(-x) ** p)

    def pairs(a, b):
        return torch.einsum("bnhd,bmhd,bm->bhnm", a, b, keep) / count

    same = pairs(positive(q), positive(k)) + pairs(negative(q), negative(k))
    opposite = pairs(positive(q), negative(k)) + pairs(negative(q), positive(k))
    outs = []
    for weights, values in zip((same, opposite), v.chunk(2, dim=-1), strict=True):
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
        outs.append(torch.einsum("bhnm,bmhd->bnhd", weights, values))
    return torch.cat(outs, dim=-1) * keep[:, :, None, None]


@pytest.mark.quick
@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
@pytest.mark.parametrize("mask", [False, True])
def test_values_by_polarity_and_the_gradient_of_powers(backend, mask):
    inputs = make_inputs(heads=3, mask=mask, rotary=False)
    powers = powers_of(inputs.projection).requires_grad_()
    inputs = inputs._replace(powers=powers)
    q, k, v, _ = inputs.projection.unbind(2)
    expected = by_hand(q, k, v, powers, inputs.mask)
    out = attend("pola", inputs, backend)
    assert relative_error(out, expected) < 1e-12
    wanted = (inputs.projection, powers)
    for found, exact in zip(
        torch.autograd.grad(out, wanted, inputs.grad),
        torch.autograd.grad(expected, wanted, inputs.grad),
        strict=True,
    ):
        assert relative_error(found, exact) < 1e-12


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_powers_of_any_type(backend, dtype):
    """Their gradient is of their type, whatever that of the queries."""
    inputs = make_inputs(dtype=torch.float32, rotary=False)
    powers = powers_of(inputs.projection).to(dtype).requires_grad_()
    out = attend("pola", inputs._replace(powers=powers), backend)
    (grad,) = torch.autograd.grad(out, powers, inputs.grad)
    wide = powers.detach().double().requires_grad_()
    double = inputs._replace(projection=inputs.projection.detach().double(), powers=wide)
    exact = attend("pola", double, "naive")
    (expected,) = torch.autograd.grad(exact, wide, inputs.grad.double())
    assert grad.dtype == dtype
    assert relative_error(grad, expected) < {torch.float32: 1e-5}.get(dtype, 1e-2)


@each_gradcheck("backend", [(name,) for name in BACKENDS], slow=[("library",)])
def test_gradcheck_of_powers(backend, fast):
    inputs = make_inputs(grid=(2, 3), dim=4, mask=True, rotary=False)
    powers = powers_of(inputs.projection).requires_grad_()

    def run(projection, powers):
        return attend("pola", inputs._replace(powers=powers), backend, projection)

    assert torch.autograd.gradcheck(run, (inputs.projection, powers), fast_mode=fast)


def test_derivatives_of_signed_powers():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    x = (x + 0.3 * x.sign()).requires_grad_()
    powers = (1.5 + 3 * torch.rand(3, 1, 4, dtype=torch.float64)[:, 0]).requires_grad_()
    assert torch.autograd.gradcheck(signed_powers, (x, powers), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(signed_powers, (x, powers))
    grad = torch.func.grad(lambda row, p: signed_powers(row, p).sum())
    rows = torch.func.vmap(grad, in_dims=(0, None))(x.detach(), powers.detach())
    torch.testing.assert_close(
        rows, powers.detach() * x.detach().abs() ** (powers.detach() - 1) * x.sign()
    )


def test_signed_powers_keep_no_features():
    kept = []
    x, powers = torch.randn(2, 5, 4, requires_grad=True), torch.rand(5, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        signed_powers(x, powers + 1)
    assert {t.data_ptr() for t in kept} >= {x.data_ptr()}
    assert max(t.numel() for t in kept) == x.numel() and sum(t.numel() for t in kept) < 80


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_of_zeros_and_of_huge_numbers(with_gradient, dtype):
    """0 is 0 with all derivatives, also where p rounds to 1; what is beyond the type saturates."""
    x = torch.tensor([0.0, -0.0, 2.0, -3.0, 1e-30, 1e30, -torch.finfo(dtype).max], dtype=dtype)
    for p in (1.0, 1 + torch.finfo(dtype).eps, 3.0, 5.0):
        powers = torch.full_like(x, p)
        with torch.set_grad_enabled(with_gradient):
            leaves = x.clone().requires_grad_(), powers.clone().requires_grad_()
            out = signed_powers(*leaves)
        positive, negative = out.detach().chunk(2)
        assert out.isfinite().all() and (out >= 0).all()
        assert not positive[[0, 1, 3, 6]].any() and not negative[[0, 1, 2, 4, 5]].any()
        torch.testing.assert_close(positive[2], torch.tensor(2.0, dtype=dtype) ** p)
        torch.testing.assert_close(negative[3], torch.tensor(3.0, dtype=dtype) ** p)
        if with_gradient:
            of_x, of_powers = torch.autograd.grad(out, leaves, torch.ones_like(out))
            assert of_x.isfinite().all() and of_powers.isfinite().all()
            assert not of_x[:2].any() and not of_powers[:2].any()
            assert of_x[2] > 0 > of_x[3] and (of_powers[2:4] > 0).all()


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_signed_powers(dtype):
    x = torch.tensor([[0.0, 1.5, -2.0, 1e3]], dtype=dtype, requires_grad=True)
    powers = torch.tensor([[1.0, 2.0, 3.5, 5.0]], dtype=dtype, requires_grad=True)
    compiled = torch.compile(signed_powers, backend="aot_eager", fullgraph=True)
    out, expected = compiled(x, powers), signed_powers(x, powers)
    torch.testing.assert_close(out, expected)
    grad = torch.rand_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (x, powers), grad),
        torch.autograd.grad(expected, (x, powers), grad),
    )


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("p", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("case", ["zeros", "padding", "one token", "huge", "small", "opposite"])
def test_finite(backend, dtype, p, case):
    inputs = make_inputs(
        grid=(1, 1) if case == "one token" else (5, 6), dtype=dtype, mask=case == "padding"
    )
    powers = torch.full((2, 8), p, requires_grad=True)
    projection = inputs.projection.detach()
    projection[:, :, 2] *= 300
    if case == "zeros":
        projection.zero_()
    elif case == "padding":
        inputs.mask[0] = True
        projection[0] = torch.nan
    elif case == "huge":
        projection[:, :, :2] *= 1e4 if dtype == torch.float16 else 1e12
    elif case == "small":
        projection[:, :, :2] *= 1e-7
    elif case == "opposite":  # nothing for the first read
        projection[:, :, 0].abs_()
        projection[:, :, 1].abs_().neg_()
    projection.requires_grad_()
    out = attend("pola", inputs._replace(projection=projection, powers=powers), backend)
    grad, of_powers = torch.autograd.grad(out, (projection, powers), inputs.grad)
    assert out.isfinite().all() and grad.isfinite().all() and of_powers.isfinite().all()
    if case in ("zeros", "padding"):
        assert not out[0].any() and not grad[0].any()
    if case == "opposite":
        assert not out[..., :4].any() and out[..., 4:].any()


BAD = {
    "mechanism 'pola' needs powers, [h, D] = (2, 8)": {"mechanism": "pola"},
    "mechanism 'elu' takes no powers": {"powers": torch.ones(2, 8)},
    "powers must be floating-point and [h, D] = (2, 8), got (8,)": {
        "mechanism": "pola",
        "powers": torch.ones(8),
    },
    "needs an even number of channels, got 5": {
        "mechanism": "pola",
        "powers": torch.ones(2, 8),
        "v": torch.zeros(1, 6, 2, 5),
    },
    "this mechanism has no positions": {
        "mechanism": "pola",
        "powers": torch.ones(2, 8),
        "rotary": ops.rotary_tables(2, 3, 8),
    },
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_named(message):
    arguments = dict.fromkeys("qkv", torch.zeros(1, 6, 2, 8)) | BAD[message]
    with pytest.raises(ValueError) as caught:
        ops.linear_attention(**arguments)
    assert message in str(caught.value)


def test_other_layers_do_not_take_it():
    from vitlinear.layers import GatedAttention

    with pytest.raises(ValueError, match="'pola' learns powers, which only layers of its own"):
        GatedAttention(16, 2, "pola")
