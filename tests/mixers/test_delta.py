"""The delta rule: what its solvers share with other attentions, its scans, and their kernels."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from tests.mixers.test_contract import HEADS, close, mixer_of, normal, tokens
from vitlinear.mixers import Grid, delta_scans
from vitlinear.mixers.delta import approach
from vitlinear.mixers.lla import eliminated


def test_steps_approach_the_solution():
    """The greatest residual over all eigenvalues falls, by Chebyshev's steps faster."""
    lowest = torch.tensor(0.02, dtype=torch.float64)
    matrix = torch.diag(torch.linspace(0.02, 1.02, 40, dtype=torch.float64))
    identity = torch.eye(40, dtype=torch.float64)
    residuals = {
        solver: [
            float((identity - matrix @ approach(matrix, identity, lowest, solver, n)).abs().max())
            for n in range(1, 5)
        ]
        for solver in ("richardson", "chebyshev")
    }
    for falling in residuals.values():
        assert falling == sorted(falling, reverse=True)
    assert residuals["chebyshev"][3] < 0.7 < residuals["richardson"][3]
    exact = approach(matrix, identity, lowest, "solve", 1)
    close(approach(matrix, identity, lowest, "richardson", 2000), exact, 1e-9)
    full = normal(40, 40)
    full = full @ full.T + matrix
    close(eliminated(full, identity), torch.linalg.inv(full), 1e-9)


def test_first_step_is_linear_attention():
    """One step reads the state itself, which the norm scales: keys of length 1, weights b."""
    grid, mixer = Grid(3, 4), mixer_of("delta", solver="richardson", steps=1)
    q, k, v, x = tokens(grid)
    features = torch.nn.functional.normalize(torch.nn.functional.silu(k), dim=-1)
    beta = mixer.step(x).sigmoid().unsqueeze(-1)
    state = torch.einsum("bnhd,bnhe->bhde", beta * features, v)
    query = torch.nn.functional.normalize(torch.nn.functional.silu(q), dim=-1)
    out = torch.einsum("bnhd,bhde->bnhe", query, state)
    found = mixer(q, k, v, grid, x) / mixer.norm_weight
    close(
        torch.nn.functional.normalize(found, dim=-1),
        torch.nn.functional.normalize(out, dim=-1),
        1e-4,
    )


@pytest.mark.parametrize("name", ["delta", "kimi_delta"])
def test_scans_over_many_chunks(name):
    grid, mixer = Grid(9, 15), mixer_of(name, form="scans_2")
    inputs = tokens(grid, batch=1)
    close(mixer(*inputs[:3], grid, inputs[3]), mixer.definition(*inputs[:3], grid, inputs[3]), 1e-9)


def test_fast_forgetting_in_single_precision():
    """Falls at their bound, whose exponentials over a chunk would reach 1e34."""
    grid = Grid(8, 8)
    q, k, v = (t.float() for t in tokens(grid)[:3])
    k = torch.nn.functional.normalize(k, dim=-1).requires_grad_()
    beta, falls = torch.full((2, 64, HEADS, 1), 0.9), torch.full(k.shape, 5.0)
    out = delta_scans.directional(q, k, v, beta, falls, grid, 2)
    wide = (t.double() for t in (q, k, v, beta, falls))
    close(out.double(), delta_scans.naive_scan(*wide, grid, 2), 1e-5)
    assert torch.autograd.grad(out.sum(), k)[0].isfinite().all()


@pytest.mark.parametrize("name", ["delta", "kimi_delta"])
def test_kernels_of_flash_linear_attention(name, monkeypatch):
    """A stand-in for the package gets what its functions take, and its result is used."""
    calls = []

    def stand_in(kernel):
        def run(*, q, k, v, beta, scale, g=None):
            assert scale == 1.0 and beta.shape == q.shape[:3]
            assert all(t.dtype == torch.bfloat16 and t.is_contiguous() for t in (q, k, v, beta))
            calls.append(kernel)
            wide = [t.double() for t in (q, k, v, beta.unsqueeze(-1))]
            falls = None if g is None else -g.double()
            return delta_scans.scan(*wide, falls).to(v.dtype), None

        return run

    for module, function in (("delta_rule", "chunk_delta_rule"), ("kda", "chunk_kda")):
        fake = types.ModuleType(f"fla.ops.{module}")
        setattr(fake, function, stand_in(module))
        monkeypatch.setitem(sys.modules, f"fla.ops.{module}", fake)
    for package in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setattr(delta_scans, "runs_fused", lambda q, half: half is not None)
    delta_scans.fused_scan.cache_clear()
    try:
        grid, mixer = Grid(4, 5, 1), mixer_of(name, torch.bfloat16, form="scans_4")
        inputs = [t.bfloat16() for t in tokens(grid)]
        out = mixer(*inputs[:3], grid, inputs[3])
        assert calls == ["delta_rule" if name == "delta" else "kda"]
        wide = mixer.double()
        expected = wide.definition(*(t.double() for t in inputs[:3]), grid, inputs[3].double())
        close(out.double(), expected, 0.1)
        wide(*(t.double() for t in inputs[:3]), grid, inputs[3].double())
        assert len(calls) == 1  # in float64, no kernel
    finally:
        delta_scans.fused_scan.cache_clear()
