"""Identities that attentions of the registry have on paper, with the cases where they hold.

Those of rows of the operator are in tests/ops/test_identities.py: MALA's contrast and InLine's
covariance hold without positions, and LightNet's merging of states always. `test_options` has the
limits of single mixers: softmax as local regression with a large ridge, and InLine as the uniform
one without its inverse.
"""

from __future__ import annotations

import pytest
import torch

from tests.mixers.test_contract import DIM, HEADS, close, mixer_of, normal, tokens
from vitlinear import ops
from vitlinear.mixers import Grid
from vitlinear.mixers.decay import two_sided_sums
from vitlinear.mixers.delta import approach
from vitlinear.mixers.operator import attend
from vitlinear.mixers.taylor import monomials, taylor_features

GRID = Grid(3, 5)


@pytest.mark.quick
def test_uniform_local_regression_is_affine_ridge_regression():
    """With any ridge: the affine map of least squares of all values on all keys, evaluated at q."""
    q, k, v, _ = tokens(GRID, batch=1)
    mixer = mixer_of("lla_uniform")
    with torch.no_grad():
        mixer.log_ridge.fill_(-2.0)
    ridge = mixer.log_ridge.detach().exp()
    out = mixer(q, k, v, GRID)
    for head in range(HEADS):
        keys, values, queries = k[0, :, head], v[0, :, head], q[0, :, head]
        # Least squares on [k, 1], the ridge on the slope alone, as rows added to the data.
        ones = torch.ones(GRID.length, 1, dtype=torch.float64)
        penalty = (GRID.length * ridge[head]).sqrt() * torch.eye(DIM, DIM + 1, dtype=torch.float64)
        data = torch.cat((torch.cat((keys, ones), dim=1), penalty))
        target = torch.cat((values, torch.zeros(DIM, DIM, dtype=torch.float64)))
        weights = torch.linalg.lstsq(data, target).solution
        expected = torch.cat((queries, ones), dim=1) @ weights
        close(out[0, :, head].detach(), expected, 1e-9)


@pytest.mark.parametrize("symmetric", [False, True])
def test_taylor_features_have_the_polynomial_as_product(symmetric):
    """phi(q) . phi(k) = 1 + x + x^2 / 2 for every x = q . k, which is never under 1/2."""
    q, k = 3 * normal(2, 200, DIM)
    tables = [monomials(DIM, 2)] if symmetric else []
    features = (taylor_features(t, 2, tables) for t in (q, k))
    product = torch.einsum("nd,nd->n", *features)
    x = (q * k).sum(-1)
    close(product, 1 + x + x**2 / 2, 1e-12)
    assert product.min() > 0.5 - 1e-9 and x.min() < -5


def test_window_is_the_complement_of_its_linear_part():
    """Linear sums of all keys less those of the window, plus softmax's: the masked matrix.

    One denominator; holds with unbounded scores as they are, so with the same shift for both.
    """
    q, k, v, _ = tokens(GRID)
    phi_q, phi_k = q.exp(), k.exp()
    near = torch.zeros(GRID.length, GRID.length, dtype=torch.bool)
    for start in range(0, GRID.length, 5):  # windows: the rows of the map
        near[start : start + 5, start : start + 5] = True
    linear = torch.einsum("bnhd,bmhd->bhnm", phi_q, phi_k)
    exact = (torch.einsum("bnhd,bmhd->bhnm", q, k) * DIM**-0.5).exp()
    masked = torch.where(near, exact, linear)
    expected = torch.einsum("bhnm,bmhd->bnhd", masked / masked.sum(-1, keepdim=True), v)

    ones = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)  # values and their denominator
    everything = attend(phi_q, phi_k, ones, "identity", GRID) * GRID.length

    def rows(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(1, (3, 5)).flatten(0, 1)

    row = Grid(1, 5)
    inside = attend(rows(phi_q), rows(phi_k), rows(ones), "identity", row) * 5
    softmax = torch.einsum("bnhd,bmhd->bhnm", rows(q), rows(k)) * DIM**-0.5
    softmax = torch.einsum("bhnm,bmhd->bnhd", softmax.exp(), rows(ones))
    sums = everything + (softmax - inside).unflatten(0, (2, 3)).flatten(1, 2)
    close(sums[..., :-1] / sums[..., -1:], expected, 1e-10)


@pytest.mark.parametrize("length", [5, 40])
def test_two_sided_decay_is_two_scans_less_the_token_itself(length):
    """gamma^|i - j| by a scan forward, one backward, and one of the two tokens i taken off."""
    x, fall = normal(1, 1, length, 1, 2, 3), torch.tensor([0.3], dtype=torch.float64)
    found = two_sided_sums(x, fall, axis=2)[0, 0, :, 0]
    states = []
    for order in (range(length), reversed(range(length))):
        state, scan = torch.zeros(2, 3, dtype=torch.float64), {}
        for i in order:
            state = (-fall).exp() * state + x[0, 0, i, 0]
            scan[i] = state
        states.append(torch.stack([scan[i] for i in range(length)]))
    close(found, states[0] + states[1] - x[0, 0, :, 0], 1e-12)


def test_descent_goes_from_linear_attention_to_least_squares():
    """Steps on |K W - V|^2 from 0: the first is plain linear attention up to a factor.

    The limit, for keys of full rank, is the least squares solution.
    """
    q, k, v, _ = tokens(GRID)
    k = torch.nn.functional.normalize(k, dim=-1)
    state = ops.linear_attention_state(k, torch.cat((k, v), dim=-1), mechanism="identity").state
    covariance, right = state.split(DIM, dim=-1)
    lowest = torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    def read(weights: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bnhd,bhde->bnhe", q, weights)

    first = read(approach(covariance, right, lowest, "richardson", 1))
    close(first, ops.linear_attention(q, k, v, mechanism="identity"), 1e-12)
    limit = read(approach(covariance, right, lowest, "richardson", 20_000))
    weights = torch.linalg.lstsq(k.transpose(1, 2), v.transpose(1, 2)).solution
    close(limit, read(weights), 1e-6)


def test_flows_are_conserved():
    """Flows that compete sum to the number of queries, as many as keys: their mean is 1.

    So the released clamp at 1 ties every key above the mean.
    """
    q, k, _, _ = tokens(GRID)
    f, g = q.sigmoid(), k.sigmoid()
    incoming = torch.einsum("bnhd,bmhd->bhnm", f, g).sum(-1)
    shares = torch.einsum("bnhd,bmhd->bhnm", f, g) / incoming.unsqueeze(-1)
    competing = shares.sum(-2)  # of each key
    close(competing.sum(-1), torch.full((2, HEADS), GRID.length, dtype=torch.float64), 1e-12)
    above = competing > 1
    assert above.any() and (~above).any()
    tied = competing.clamp(max=1)[above]
    assert torch.equal(tied, torch.ones_like(tied))
