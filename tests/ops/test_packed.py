"""Slices of one projection, whose gradient comes back as one buffer."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.ops.inputs import BACKENDS
from vitlinear import ops
from vitlinear.ops import packed

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_number = pytest.mark.parametrize("number", [3, 4])


def projection_of(number: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 12, number, 2, 8, dtype=dtype, requires_grad=True)


def attend(slices: tuple[Tensor, ...], backend: str, beside: int = -1) -> Tensor:
    """Attention with an epilogue: lepe from the values, a gate if there are four slices."""
    q, k, v, *others = slices
    gate = others[0] if len(others) == 2 else None
    lepe = slices[beside].cos()
    return ops.linear_attention(
        q, k, v, mechanism="mala", lepe=lepe, gate=gate, backend=backend
    ).sin()


def plainly(projection: Tensor) -> tuple[Tensor, ...]:
    parts = projection.unbind(2)
    return (*parts, parts[2])


@each_backend
@each_number
def test_gradient_is_that_of_unbind(backend, number):
    projection = projection_of(number)
    out, expected = (attend(f(projection), backend).sum() for f in (packed.unpack, plainly))
    assert torch.equal(out, expected)
    (grad,), (wanted,) = (torch.autograd.grad(x, projection) for x in (out, expected))
    torch.testing.assert_close(grad, wanted, rtol=1e-13, atol=1e-13)
    assert grad.is_contiguous()


@each_backend
def test_gradcheck(backend):
    def run(projection: Tensor) -> Tensor:
        return attend(packed.unpack(projection), backend)

    projection = torch.randn(1, 3, 4, 1, 4, dtype=torch.float64, requires_grad=True)
    # The second time as many gradients at once, in batches.
    assert torch.autograd.gradcheck(run, projection)
    if backend == "eager":
        assert torch.autograd.gradcheck(run, projection, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(run, projection)


def sometimes(which: str, slices: tuple[Tensor, ...]) -> Tensor:
    """Something else that looks at slices, or does not look at all."""
    q, k, v, gate, values = slices
    attended = attend(slices, "library").sum()
    return {
        "all": attended,
        "queries twice": attended + q.square().sum(),
        "two attentions": attended + attend((k, q, v, gate, values), "library").sum(),
        "twice the same": attended + attend(slices, "library").square().sum(),
        "values alone": values.sum(),
        "only the gate": gate.square().sum(),
        "no attention": (q * k * v).sum(),
        "a factor before": attend((2 * q, k, v, gate, values), "library").sum(),
        "without gate": attend((q, k, v, values), "library").sum() + gate.sum(),
    }[which]


@pytest.mark.parametrize("which", [
    "all", "queries twice", "two attentions", "twice the same", "values alone", "only the gate",
    "no attention", "a factor before", "without gate",
])  # fmt: skip
def test_whoever_else_looks_at_slices(which):
    projection = projection_of(4)
    expected = torch.autograd.grad(sometimes(which, plainly(projection)), projection)
    out = sometimes(which, packed.unpack(projection))
    for _ in range(2):  # the second time from a graph that was kept
        grads = torch.autograd.grad(out, projection, retain_graph=True)
        torch.testing.assert_close(grads, expected, rtol=1e-13, atol=1e-13)


def test_slices_of_two_projections():
    """Neither gets its gradient in the other's buffer."""
    first, second = projection_of(4), projection_of(4)

    def run(unpack):
        a, b = unpack(first), unpack(second)
        return attend((a[0], a[1], b[2], b[3], b[4]), "library").sum() + a[4].sum() + b[0].sum()

    expected = torch.autograd.grad(run(plainly), (first, second))
    torch.testing.assert_close(torch.autograd.grad(run(packed.unpack), (first, second)), expected)


def test_gradients_that_callers_give_are_not_written_to():
    projection, given = projection_of(3), torch.randn(2, 12, 3, 2, 8, dtype=torch.float64)
    kept, beside = given.clone(), torch.randn(2, 12, 2, 8, dtype=torch.float64)
    slices = packed.unpack(projection)
    (grad,) = torch.autograd.grad(slices, projection, (*given.unbind(2), beside))
    assert torch.equal(given, kept)
    kept[:, :, 2] += beside
    assert torch.equal(grad, kept)


def counted(run) -> Counter[str]:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:
        run()
    return Counter(event.name for event in record.events())


@each_backend
@each_number
def test_nothing_is_stacked(backend, number):
    projection = projection_of(number, torch.float32)
    out = attend(packed.unpack(projection), backend).sum()
    assert not counted(lambda: torch.autograd.grad(out, projection))["aten::stack"]


def test_kernels_copy_nothing():
    """From the projection to its gradient, LePE's included, when kernels do the rest."""
    pytest.importorskip("triton")
    from benchmarks.host_cost import without_launches
    from vitlinear.ops.triton import INTERPRETING

    if INTERPRETING:
        pytest.skip("the interpreter launches nothing")
    projection, grad = projection_of(4, torch.bfloat16), torch.zeros(2, 12, 2, 8).bfloat16()

    def step() -> None:
        slices = packed.unpack(projection)
        lepe = -slices[4]
        out = ops.linear_attention(
            *slices[:3], mechanism="rala", lepe=lepe, gate=slices[3], backend="triton"
        )
        torch.autograd.grad(out, projection, grad)

    with without_launches() as launched:
        step()
        names = counted(step)
    assert launched.names and not {"aten::stack", "aten::cat", "aten::copy_"} & names.keys()


@pytest.mark.compile
def test_compiled_and_exported():
    projection = projection_of(4)

    class Packed(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return attend(packed.unpack(x), "eager")

    expected = Packed()(projection)
    program = torch.export.export(Packed(), (projection,))
    torch.testing.assert_close(program.module()(projection), expected)
    out = torch.compile(Packed(), backend="aot_eager", fullgraph=True)(projection)
    grads = (torch.autograd.grad(x.sum(), projection)[0] for x in (out, expected))
    torch.testing.assert_close(*grads)


def test_function_transforms():
    projection = projection_of(4).detach()
    f, g = (lambda x, u=u: attend(u(x), "eager").sum() for u in (packed.unpack, plainly))
    torch.testing.assert_close(torch.func.grad(f)(projection), torch.func.grad(g)(projection))
    tangent = torch.randn_like(projection)
    torch.testing.assert_close(
        torch.func.jvp(f, (projection,), (tangent,)), torch.func.jvp(g, (projection,), (tangent,))
    )
