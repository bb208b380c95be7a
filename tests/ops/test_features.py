"""Feature maps whose gradients are not left to autograd's formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitlinear.ops.features import cubed_key, elu_plus_one, norm_aware_query


def inputs() -> torch.Tensor:
    """Views with gaps, zeros and what exp() loses among them."""
    x = torch.linspace(-30, 5, 2 * 3 * 2 * 4, dtype=torch.float64).view(2, 3, 2, 4).unbind(2)[0]
    return torch.cat((x, torch.zeros_like(x[..., :1])), -1).transpose(0, 1).requires_grad_()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("grad", [True, False])
def test_elu_plus_one_is_exact(dtype, grad):
    """To rounding, where elu + 1 has lost 1e-4 (float64) of exp(-30) or all of it."""
    eps = torch.finfo(dtype).eps
    with torch.set_grad_enabled(grad):
        for x in (inputs(), inputs().detach().contiguous()):
            before, exact = x.to(dtype).double(), x.to(dtype).double()
            exact = torch.where(exact > 0, exact + 1, exact.exp())
            out = elu_plus_one(x.to(dtype))
            torch.testing.assert_close(out.double(), exact, rtol=25 * eps, atol=0)
            assert torch.equal(x.to(dtype).double(), before)  # nothing is written to


def test_elu_plus_one():
    x = inputs()
    torch.testing.assert_close(elu_plus_one(x), F.elu(x) + 1, rtol=0, atol=2e-16)
    grad = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    (found,), (expected,) = (
        torch.autograd.grad(f(x), x, grad) for f in (elu_plus_one, lambda x: F.elu(x) + 1)
    )
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(elu_plus_one(x), F.elu(x) + 1, rtol=0, atol=2e-16)


def test_derivatives_of_elu_plus_one():
    x = (inputs().detach() / 6 + 0.01).requires_grad_()
    assert torch.autograd.gradcheck(elu_plus_one, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(elu_plus_one, x)
    rows = torch.func.vmap(torch.func.grad(lambda row: elu_plus_one(row).sum()))(x.detach())
    torch.testing.assert_close(rows, torch.exp(x.detach().clamp(max=0)))


def test_elu_plus_one_keeps_one_tensor():
    kept = []
    x = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = elu_plus_one(x)
    assert [t.data_ptr() for t in kept] == [out.data_ptr()]


@pytest.mark.compile
@torch.no_grad()
def test_elu_plus_one_of_compiled_programs():
    x = torch.tensor([-torch.inf, -100, -20, -1, -1e-4, 0, 1e-4, 1, 100, torch.inf, torch.nan])
    program = []

    def backend(graph, inputs):
        program.append(str(graph.graph))
        return graph

    compiled = torch.compile(elu_plus_one, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), elu_plus_one(x), equal_nan=True)
    assert "exp" in program[0] and "elu" not in program[0]
    assert "elu" in str(torch.export.export(Features(), (x,)).graph)


class Features(torch.nn.Module):
    def forward(self, x):
        return elu_plus_one(x)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_features_of_nala(with_gradient):
    x = inputs().detach().clone() / 10
    x[0, 0] = 0
    norm = x.norm(dim=-1, keepdim=True)
    u, p = x / norm.clamp(min=1e-30), 3 * (0.5 + norm.tanh())
    with torch.set_grad_enabled(with_gradient):
        queries, keys = (f(x.clone().requires_grad_()) for f in (norm_aware_query, cubed_key))
    torch.testing.assert_close(queries, torch.cat((u.relu() ** p, (-u).relu() ** p), -1))
    torch.testing.assert_close(keys, torch.cat((x.relu() ** 3, (-x).relu() ** 3), -1))
