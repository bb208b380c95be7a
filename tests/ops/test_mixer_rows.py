"""Rows of the operator that attentions by name are made of, which stand beside `MECHANISMS`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ops.inputs import BACKENDS, Inputs, attend, make_inputs, oracle
from vitlinear import ops
from vitlinear.layers import check_attn_type
from vitlinear.ops.mechanisms import MIXER_ROWS

each_row = pytest.mark.parametrize("row", MIXER_ROWS)


def positive_inputs(**kwargs) -> Inputs:
    """Inputs whose queries and keys have positive products, as features have to."""
    inputs = make_inputs(**kwargs)
    return inputs._replace(projection=inputs.projection.detach().abs().requires_grad_())


@pytest.mark.quick
@each_row
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "padded"])
def test_definition(row, backend, mask):
    """Output and gradients, with positions and an epilogue, are those of the definition."""
    inputs = positive_inputs(mask=mask, epilogue=("lepe", "gate"))
    out = attend(row, inputs, backend)
    (grad,) = torch.autograd.grad(out, inputs.projection, inputs.grad)
    expected, expected_grad = oracle(row, inputs)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-8)


def elu(x):
    return F.elu(x) + 1


def halves(x):
    return torch.cat((x.softmax(-1), (-x).softmax(-1)), dim=-1)


FORMULAS = {
    "features": (lambda x: x, lambda x: x, lambda z: 1 / (z + 1e-6)),
    "signed_features": (lambda x: x, lambda x: x, lambda z: z.sign() / z.abs().clamp(min=1e-6)),
    "elu_sum": (elu, elu, torch.ones_like),
    "elu_smoothed": (elu, elu, lambda z: 1 / (z + 1e-4)),
    "silu_sum": (F.silu, F.silu, torch.ones_like),
    "softmax_halves": (halves, halves, lambda z: 1 / (z + 1e-6)),
    "weighted_identity": (lambda x: x, lambda x: x, torch.ones_like),
    "weighted_elu_sum": (elu, elu, torch.ones_like),
    "gated_identity": (lambda x: x, lambda x: x, torch.ones_like),
    "gated_elu": (elu, elu, lambda z: 1 / (z + 1e-6)),
}


def weights_for(row):
    """Weights of keys of the tokens below, of both signs where nothing divides by their sum."""
    numbers = ops.get_mechanism(row).weights_per_key(6)
    if not numbers:
        return None
    if ops.get_mechanism(row).reads.uses_norm:
        return torch.rand(2, 11, 2, numbers, dtype=torch.float64)
    return torch.randn(2, 11, 2, numbers, dtype=torch.float64)


@each_row
@pytest.mark.parametrize("backend", BACKENDS)
def test_formula(row, backend):
    """Any width of q and k and of values: the formula, written out; and its gradients."""
    q, k = torch.rand(2, 2, 11, 2, 6, dtype=torch.float64)
    if row == "signed_features":  # sums of both signs
        q[:, ::2] *= -1
    v = torch.randn(2, 11, 2, 5, dtype=torch.float64)
    w = weights_for(row)
    inputs = [x.requires_grad_() for x in (q, k, v, w) if x is not None]
    out = ops.linear_attention(q, k, v, mechanism=row, key_weights=w, backend=backend)
    phi_q, phi_k, factor = FORMULAS[row]
    features = phi_k(k) if w is None else phi_k(k) * w
    weights = torch.einsum("bnhd,bmhd->bhnm", phi_q(q), features) / 11
    weights = weights * factor(weights.sum(-1, keepdim=True))
    expected = torch.einsum("bhnm,bmhd->bnhd", weights, v)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, grad)
    for actual, exact in zip(found, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-10)


@each_row
def test_states_are_read_in_two_steps(row):
    q, k = torch.rand(2, 2, 11, 2, 6, dtype=torch.float64)
    v = torch.randn(2, 11, 2, 5, dtype=torch.float64)
    w = weights_for(row)
    state = ops.linear_attention_state(k, v, mechanism=row, key_weights=w)
    out = ops.read_linear_attention_state(q, state, mechanism=row)
    expected = ops.linear_attention(q, k, v, mechanism=row, key_weights=w)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@each_row
def test_it_is_no_attention_of_a_layer(row):
    assert row not in ops.MECHANISMS
    with pytest.raises(ValueError, match="is a part of attentions by name"):
        check_attn_type(row)
