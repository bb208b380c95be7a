"""Identities that mechanisms have on paper, checked on what runs."""

from __future__ import annotations

import pytest
import torch

from tests.ops.inputs import BACKENDS
from vitlinear import ops

N = 8  # tokens, and channels: values that are the unit vectors make outputs the weights

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def weights(q: torch.Tensor, k: torch.Tensor, mechanism: str, backend: str) -> torch.Tensor:
    """The matrix of attention weights, [N, N], read off an attention over unit vectors."""
    q, k, v = (x[None, :, None] for x in (q, k, torch.eye(N, dtype=torch.float64)))
    return ops.linear_attention(q, k, v, mechanism=mechanism, backend=backend)[0, :, 0]


@pytest.mark.quick
@each_backend
def test_mala_is_a_linear_contrast_around_normalised_shares(backend):
    """MALA weighs by a_ij (1 + 1/t_i) - t_i/N; rows sum to one.

    Scaling the features of a query by c keeps its shares a_ij/t_i and scales the contrast.
    """
    q, k = normal(N, N).abs(), normal(N, N, seed=1)  # positive: its features are q + 1
    similarity = (q + 1) @ torch.nn.functional.elu(k).add(1).T * N**-0.5 / N  # a_ij
    total = similarity.sum(1, keepdim=True)  # t_i
    for c in (1.0, 1.5, 4.0):
        actual = weights(c * (q + 1) - 1, k, "mala", backend)
        expected = similarity / total + c * (similarity - total / N)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(actual.sum(1), torch.ones(N).double(), rtol=1e-5, atol=1e-6)


@each_backend
def test_inline_reads_a_centred_covariance(backend):
    """InLine is vbar + (s/N) q sum_j (k_j - kbar)(v_j - vbar)^T; rows of weights sum to one."""
    q, k, v = (normal(N, N, seed=seed) for seed in range(3))
    covariance = (k - k.mean(0)).T @ (v - v.mean(0)) / N
    expected = v.mean(0) + N**-0.5 * q @ covariance
    inputs = (x[None, :, None] for x in (q, k, v))
    actual = ops.linear_attention(*inputs, mechanism="inline", backend=backend)[0, :, 0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    matrix = weights(q, k, "inline", backend)
    torch.testing.assert_close(matrix.sum(1), torch.ones(N).double(), rtol=1e-12, atol=1e-12)
    assert (matrix < 0).any()


def lightnet_state(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """State [D, D] and logsumexp [D] that the registered operator leaves."""
    q, k, v = (x[None, :, None] for x in (k, k, v))
    outputs = torch.ops.vitlinear.linear_attention(q, k, v, "lightnet")
    return outputs[1][0, 0], outputs[-1][0, 0, 0]


def test_lightnet_is_the_end_of_an_additive_recurrence():
    """Decay exp(z_{t-1} - z_t), key exp(k_t - z_t), z the running logsumexp of the keys."""
    k, v = normal(20, N), normal(20, N, seed=1)
    state = torch.zeros(N, N, dtype=torch.float64)
    z = torch.full((N,), -torch.inf, dtype=torch.float64)
    for key, value in zip(k, v, strict=True):
        previous, z = z, torch.logaddexp(z, key)
        state = (previous - z).exp()[:, None] * state + torch.outer((key - z).exp(), value)
    torch.testing.assert_close(lightnet_state(k, v)[0], state, rtol=1e-12, atol=1e-12)


@pytest.mark.quick
def test_lightnet_states_of_shards_merge():
    """States of parts of a sequence and their logsumexps give the state of the whole."""
    k, v = 5 * normal(20, N), normal(20, N, seed=1)
    (state_a, z_a), (state_b, z_b) = lightnet_state(k[:7], v[:7]), lightnet_state(k[7:], v[7:])
    z = torch.logaddexp(z_a, z_b)
    merged = (z_a - z).exp()[:, None] * state_a + (z_b - z).exp()[:, None] * state_b
    expected, expected_z = lightnet_state(k, v)
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z, expected_z, rtol=1e-12, atol=1e-12)
