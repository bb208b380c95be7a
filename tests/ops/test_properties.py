"""The numerics contract of every mechanism, by hypothesis: what may come in, and what comes out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.inputs import ATTENTIONS, BACKENDS, Inputs, attend, make_inputs
from vitlinear import ops

each_backend = pytest.mark.parametrize("backend", BACKENDS)

GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))

# What a row of queries or keys may look like, as a function of normal numbers.
ROWS = {
    "normal": lambda x: x,
    "zero": torch.zeros_like,
    "tiny": lambda x: x * 1e-30,
    "small": lambda x: x * 1e-6,
    "constant": lambda x: x[:1, :1].expand_as(x),
    "one token": lambda x: x * (torch.arange(x.shape[1]) == 0)[:, None, None],
    "features vanish": lambda x: -30 - x.abs(),
    "large": lambda x: x * 1e3,
    "huge": lambda x: x * 1e4,
}


@each_backend
@settings(deadline=None, max_examples=150)
@given(
    mechanism=st.sampled_from(list(ops.MECHANISMS)),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    grid=GRIDS,
    queries=st.sampled_from(list(ROWS)),
    keys=st.sampled_from(list(ROWS)),
    value_scale=st.sampled_from([0.0, 1e-20, 1.0, 300.0]),
    rotary=st.booleans(),
    mask=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_finite(backend, mechanism, dtype, grid, queries, keys, value_scale, rotary, mask, seed):
    """Finite outputs and gradients for any finite input, values up to about 1e3."""
    mask = mask and grid[0] * grid[1] > 3  # leaves every sample a token
    inputs = make_inputs(grid=grid, rotary=rotary, mask=mask, dtype=torch.float32, seed=seed)
    q, k, v, _ = inputs.projection.detach().unbind(2)
    rows = torch.stack((ROWS[queries](q), ROWS[keys](k), v * value_scale, v), dim=2)
    limit = torch.finfo(dtype).max
    projection = rows.clamp(-limit, limit).to(dtype).requires_grad_()
    inputs = inputs._replace(projection=projection, grad=inputs.grad.to(dtype))
    out = attend(mechanism, inputs, backend)
    (grad,) = torch.autograd.grad(out, projection, inputs.grad)
    assert out.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_backend
def test_norm_aware_features_of_zero_and_almost_zero(backend, dtype):
    """Zero queries read nothing; ever shorter ones keep reading the same as long as they can."""
    inputs = make_inputs(dtype=dtype)
    lengths = (1e-8, 1e-12, 1e-16)
    outs = []
    for length in (*lengths, 0.0):
        projection = inputs.projection.detach().clone()
        projection[:, :, 0] *= length
        outs.append(attend("nala", inputs, backend, projection))
    for out in outs[1:-1]:  # direction alone decides: tanh of the norm is next to nothing
        torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-6)
    assert not outs[-1].any() and outs[0].abs().max() > 0.1


@each_backend
@settings(deadline=None, max_examples=60)
@given(
    attention=st.sampled_from(ATTENTIONS),
    rows=st.integers(1, 6),
    kept=st.integers(1, 6),
    width=st.integers(1, 6),
    rotary=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_padding_equals_cropping(backend, attention, rows, kept, width, rotary, seed):
    kept = min(kept, rows)
    inputs = make_inputs(grid=(rows, width), rotary=rotary, seed=seed)
    inside = torch.arange(rows * width) < kept * width
    mask = ~inside.expand(2, -1)
    out = attend(attention, inputs._replace(mask=mask), backend)
    (grad,) = torch.autograd.grad(out, inputs.projection, inputs.grad)
    tables = (ops.rotary_tables, ops.lrpe_tables) if rotary else (lambda *_, **__: None,) * 2
    cropped = Inputs(
        inputs.projection.detach()[:, inside].requires_grad_(),
        tables[0](kept, width, 8, dtype=torch.float64),
        None,
        inputs.grad[:, inside],
        tables[1](kept, width, 8, dtype=torch.float64),
    )
    expected = attend(attention, cropped, backend)
    (expected_grad,) = torch.autograd.grad(expected, cropped.projection, cropped.grad)
    # A normaliser of the size of its eps magnifies rounding a million times.
    torch.testing.assert_close(out[:, inside], expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(grad[:, inside], expected_grad, rtol=1e-6, atol=1e-6)


@each_backend
@settings(deadline=None, max_examples=60)
@given(
    attention=st.sampled_from(ATTENTIONS),
    grid=GRIDS,
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_order_of_tokens_and_other_samples_do_not_matter(backend, attention, grid, batch, seed):
    """Without positions: permuted tokens give permuted outputs, and samples stand alone."""
    inputs = make_inputs(grid=grid, batch=batch, rotary=False, seed=seed)
    out = attend(attention, inputs, backend)
    order = torch.randperm(out.shape[1], generator=torch.Generator().manual_seed(seed))
    permuted = attend(attention, inputs, backend, inputs.projection[:, order])
    torch.testing.assert_close(permuted, out[:, order], rtol=1e-8, atol=1e-8)
    alone = attend(attention, inputs, backend, inputs.projection[-1:])
    torch.testing.assert_close(alone, out[-1:], rtol=1e-10, atol=1e-10)
