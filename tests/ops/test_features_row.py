"""The row of the operator for features that the caller makes, which stands beside `MECHANISMS`."""

from __future__ import annotations

import pytest
import torch

from tests.ops.inputs import BACKENDS, Inputs, attend, make_inputs, oracle
from vitlinear import ops
from vitlinear.layers import check_attn_type

FEATURES = "features"


def positive_inputs(**kwargs) -> Inputs:
    """Inputs whose queries and keys have positive products, as features have to."""
    inputs = make_inputs(**kwargs)
    return inputs._replace(projection=inputs.projection.detach().abs().requires_grad_())


@pytest.mark.quick
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "padded"])
def test_definition(backend, mask):
    """Output and gradients, with positions and an epilogue, are those of the definition."""
    inputs = positive_inputs(mask=mask, epilogue=("lepe", "gate"))
    out = attend(FEATURES, inputs, backend)
    (grad,) = torch.autograd.grad(out, inputs.projection, inputs.grad)
    expected, expected_grad = oracle(FEATURES, inputs)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_elu_of_features(backend):
    """Any width of features and of values: with elu's features it is ``elu``."""
    q, k = torch.randn(2, 2, 11, 2, 6, dtype=torch.float64)
    v = torch.randn(2, 11, 2, 5, dtype=torch.float64)
    features = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    out = ops.linear_attention(*features, v, mechanism=FEATURES, backend=backend)
    expected = ops.linear_attention(q, k, v, mechanism="elu", backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_states_are_read_in_two_steps():
    q, k = torch.rand(2, 2, 11, 2, 6, dtype=torch.float64)
    v = torch.randn(2, 11, 2, 5, dtype=torch.float64)
    state = ops.linear_attention_state(k, v, mechanism=FEATURES)
    out = ops.read_linear_attention_state(q, state, mechanism=FEATURES)
    expected = ops.linear_attention(q, k, v, mechanism=FEATURES)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_it_is_no_attention_of_a_layer():
    assert FEATURES not in ops.MECHANISMS
    with pytest.raises(ValueError, match="takes features"):
        check_attn_type(FEATURES)
