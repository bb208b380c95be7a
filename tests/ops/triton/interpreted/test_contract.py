"""The operator's contract, kept by the kernels in the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.golden import relative_error
from tests.ops.checks import each_check
from tests.ops.inputs import attend, make_inputs, operator_arguments, oracle
from tests.ops.triton.cases import by_operators, many_splits, run
from tests.pairwise import pairwise, some_by_night
from vitlinear import ops
from vitlinear.ops import packed
from vitlinear.ops import registered as library
from vitlinear.ops import triton as kernels
from vitlinear.ops.terms import Terms
from vitlinear.ops.triton import calls
from vitlinear.ops.triton.plan import make_plan

each_mechanism = pytest.mark.parametrize("mechanism", list(ops.MECHANISMS))


def test_the_interpreter_runs():
    assert kernels.INTERPRETING


@pairwise(every=2, mechanism=ops.MECHANISMS, splits=[False, True])
def test_saved_states_are_those_of_the_formula(mechanism, splits, monkeypatch):
    """So that the formula's backward can follow the kernels' forward where a kernel fails."""
    if splits:
        many_splits(monkeypatch)
    inputs = make_inputs(grid=(6, 11), dtype=torch.float32)
    q, k, v, _ = inputs.projection.detach().unbind(2)
    arguments = (q, k, v, mechanism, *inputs.terms(mechanism).flatten())
    fused = library.linear_attention_op(*arguments, "triton")
    plain = library.linear_attention_op(*arguments, "library")
    for a, b in zip(fused, plain, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("splits", [False, True], ids=["one kernel", "splits"])
def test_tau_of_the_registered_operator(splits, monkeypatch):
    """Its states have their shapes; those of plain calls are vectors, which may be longer."""
    if splits:
        many_splits(monkeypatch)
    inputs = make_inputs(grid=(6, 11), dtype=torch.float32)
    q, k, v, _ = inputs.projection.detach().unbind(2)
    scale = torch.tensor([-1.5, 0.5], requires_grad=True)
    terms = inputs.terms("l2")._replace(head_scale=scale).flatten()

    def gradient(backend: str) -> torch.Tensor:
        out = library.linear_attention_op(q, k, v, "l2", *terms, backend)[0]
        (grad,) = torch.autograd.grad(out, scale, inputs.grad)
        return grad

    torch.testing.assert_close(gradient("triton"), gradient("library"), rtol=1e-4, atol=1e-5)


@pairwise(every=2, mechanism=ops.MECHANISMS, dtype=[torch.float16, torch.bfloat16])
def test_half_precision(mechanism, dtype):
    """Rounded once, at the end; the interpreter cuts bfloat16 off where a GPU rounds."""
    inputs = make_inputs(grid=(5, 7), dim=12, dtype=dtype)
    expected = oracle(mechanism, inputs)
    out, grad = run(mechanism, inputs)
    assert out.dtype == grad.dtype == dtype
    limit = {torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    assert relative_error(out, expected[0]) < limit
    assert relative_error(grad, expected[1]) < limit


@pairwise(
    mechanism=ops.MECHANISMS,
    case=[
        "zero queries", "constant keys", "vanishing normaliser", "large", "huge", "zeros", "alone",
    ],
    dtype=[torch.float32, torch.float16],
    every=3,
)  # fmt: skip
def test_finite(mechanism, dtype, case, monkeypatch):
    many_splits(monkeypatch)
    grid = (1, 1) if case == "alone" else (4, 10)
    inputs = make_inputs(grid=grid, dim=16, batch=1, heads=1, dtype=dtype)
    projection = inputs.projection.detach()
    projection[:, :, 2] *= 300
    if case == "zero queries":
        projection[:, :, 0] = 0
    elif case == "constant keys":
        projection[:, :, 1] = projection[:1, :1, 1]
    elif case == "vanishing normaliser":
        projection[:, :, :2] = -30 - projection[:, :, :2].abs()
    elif case == "large":
        projection[:, :, :2] *= 1000
    elif case == "huge":
        largest = 1e10 if mechanism == "nala" else 1e12  # nala cubes its keys
        projection[:, :, :2] *= 10000 if dtype == torch.float16 else largest
    elif case == "zeros":
        projection.zero_()
    out, grad = run(mechanism, inputs._replace(projection=projection))
    assert out.isfinite().all() and grad.isfinite().all()


@each_mechanism
def test_float16_saturates(mechanism):
    inputs = make_inputs(grid=(4, 4), dim=16, batch=1, dtype=torch.float16)
    inputs = inputs._replace(head_scale=torch.full((2,), 1e7))
    for actual in run(mechanism, inputs):
        assert actual.isfinite().all() and actual.abs().max() == 65504


@pytest.mark.parametrize("scale", [10.0, 100.0])
@pytest.mark.parametrize("mechanism", ["rala", "lightnet"])
def test_one_key_with_all_the_weight(mechanism, scale):
    """Its gradient through the softmax is what cancellation leaves."""
    inputs = make_inputs(grid=(6, 8), dim=16, batch=1, dtype=torch.float32, scale=scale)
    expected = oracle(mechanism, inputs)
    q, k, v, _ = inputs.projection.unbind(2)
    plain = ops.linear_attention(
        q, k, v, mechanism=mechanism, rotary=inputs.tables(mechanism), backend="eager"
    )
    plain = (plain, torch.autograd.grad(plain, inputs.projection, inputs.grad)[0])
    for fused, eager, exact in zip(run(mechanism, inputs), plain, expected, strict=True):
        assert relative_error(fused, exact) <= 2 * relative_error(eager, exact) + 1e-6


# One of each kind of weights of keys in every run.
@some_by_night("mechanism", ops.MECHANISMS, every_run=("rala", "lightnet", "pola"))
def test_repeats_are_bit_equal(mechanism, monkeypatch):
    many_splits(monkeypatch)
    inputs = make_inputs(grid=(7, 9), batch=1, dtype=torch.float32)
    first = run(mechanism, inputs)
    for a, b in zip(run(mechanism, inputs), first, strict=True):
        assert torch.equal(a, b)


def test_samples_do_not_see_each_other():
    inputs = make_inputs(grid=(3, 7), batch=3, heads=3, dtype=torch.float32)
    out, grad = run("rala", inputs)
    for i in range(3):
        alone = inputs._replace(
            projection=inputs.projection[i : i + 1], grad=inputs.grad[i : i + 1]
        )
        for a, b in zip(run("rala", alone), (out, grad), strict=True):
            assert torch.equal(a, b[i : i + 1])


@each_check("mechanism", [("rala",), ("mala",), ("lightnet",)], traced=[("rala",)])
def test_opcheck(mechanism, checks):
    inputs = make_inputs(mask=True, heads=1, batch=1, dtype=torch.float32)
    operator, arguments = operator_arguments(mechanism, inputs)
    torch.library.opcheck(operator, (*arguments, "triton"), test_utils=checks)


@pytest.mark.compile
def test_compile_fullgraph():
    inputs = make_inputs(grid=(4, 6), dtype=torch.float32)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    out = compiled("mala", inputs, "triton")
    (grad,) = torch.autograd.grad(out, inputs.projection, inputs.grad)
    for a, b in zip((out, grad), run("mala", inputs), strict=True):
        assert torch.equal(a, b)


@pairwise(every=2, number=[3, 4], mechanism=["rala", "mala"])
def test_packed_projection(mechanism, number, monkeypatch):
    """Gradients of kernels in one buffer, with that of LePE added, and a slice that is free."""
    many_splits(monkeypatch)
    tables = ops.rotary_tables(5, 13, 8)
    torch.manual_seed(0)
    projection = torch.randn(2, 65, 4, 2, 8, requires_grad=True)

    def run(x: torch.Tensor, backend: str) -> torch.Tensor:
        q, k, v, gate, values = packed.unpack(x)
        out = ops.linear_attention(
            q, k, v, mechanism=mechanism, lepe=values.cos(),
            rotary=ops.RotaryTables(*(table.to(x.dtype) for table in tables)),
            gate=gate if number == 4 else None, backend=backend,
        )  # fmt: skip
        (grad,) = torch.autograd.grad((out * gate).sin().sum(), x)
        return grad

    expected = run(projection.detach().double().requires_grad_(), "eager")
    assert relative_error(run(projection, "triton"), expected) < 1e-5


def test_float64_and_empty_batches():
    inputs = make_inputs()
    out, grad = run("rala", inputs)
    expected = oracle("rala", inputs)
    assert relative_error(out, expected[0]) < 1e-12 and relative_error(grad, expected[1]) < 1e-12
    assert ops.choose_backend("triton", ops.Workload("cpu", torch.float64, 15, 8, "rala")) == (
        "eager",
        "the kernels have no float64",
    )
    inputs = make_inputs(dtype=torch.float32)
    empty = inputs._replace(projection=inputs.projection[:0], grad=inputs.grad[:0])
    assert run("mala", empty)[0].shape == (0, 15, 2, 8)


def test_a_failing_kernel_says_so(monkeypatch):
    """Asked for by name it raises; otherwise the formulas run, with one warning."""
    from vitlinear.ops import backend

    def broken(*_, **__):
        raise RuntimeError("out of luck") from ValueError("no registers left")

    inputs = make_inputs(dtype=torch.float32)
    q, k, v, _ = inputs.projection.detach().unbind(2)
    arguments = (q, k, v, "mala", *inputs.terms("mala").flatten())
    expected = library.linear_attention_op(*arguments)[0]
    monkeypatch.setattr(kernels, "forward", broken)
    monkeypatch.setattr(backend, "_failures", {})
    with pytest.raises(ops.KernelError, match="ValueError: no registers left"):
        ops.linear_attention(q, k, v, mechanism="mala", rotary=inputs.rotary, backend="triton")
    with pytest.warns(UserWarning, match="the formulas run instead: ValueError: no registers"):
        out = library.linear_attention_op(*arguments, "auto")[0]
    assert torch.equal(out, expected)
    assert {kind.mechanism for kind in backend._failures} == {"mala"}
    assert all("no registers left" in reason for reason in backend._failures.values())


@pytest.mark.parametrize("length", [49, 196, 784, 3136, 16384, 60800, 262144])
@pytest.mark.parametrize("slots", [1, 2, 8, 64, 4096])
@pytest.mark.parametrize("mechanism", ["mala", "nala", "lightnet"])
def test_workspace_is_bounded(length, slots, mechanism, monkeypatch):
    """By what fills the device; from 16384 tokens on by a hundredth of the inputs, or two states a
    processor and two for each head of a sample.
    """
    monkeypatch.setattr(calls, "processors", lambda device: 132)
    row = ops.get_mechanism(mechanism)
    terms = Terms(ops.rotary_tables(1, 1, 64))
    plan = make_plan(row, torch.bfloat16, 64, terms)
    summing, wide = calls.cuts(plan, slots, length, 2, torch.device("cpu"))
    for cut in (summing, wide):
        assert cut.chunk * cut.splits >= length > cut.chunk * (cut.splits - 1)
        assert cut.splits * slots <= 4 * 132 + slots
    if length >= 16384 and summing.splits > 1:
        state = (plan.rows * 64 + plan.features + 64) * 4
        inputs = 4 * slots * length * 64 * 2
        states = slots * (summing.splits + 1) * state
        assert states <= max(0.01 * inputs, (2 * 132 + 2 * slots) * state)
    if slots * length >= 60800 and length >= 3136:
        assert summing.splits * slots >= 1.8 * 132, "nearly two programs for each processor"
    if length >= 3136:
        assert summing.splits * slots >= 132, "each processor has a program, for one image too"


@pytest.mark.parametrize(
    ("slots", "splits"), [(1, 264), (2, 132), (64, 4), (100, 5), (140, 3), (264, 1), (4096, 1)]
)
def test_programs_come_in_full_rounds(slots, splits):
    """Of the 264 that 132 processors run at once: 500 in two rounds sooner than 200 in one."""
    assert calls.splits_that_fill(slots, 264) == splits


def test_operators_without_autograd():
    """As they are captured on a GPU."""
    inputs = make_inputs(grid=(4, 6), dtype=torch.float32)
    found = by_operators("rala", inputs.projection.detach(), inputs.rotary, inputs.grad, "triton")
    out, grad = run("rala", inputs._replace(mask=None))
    torch.testing.assert_close(found[:2], (out, grad[:, :, :3]))


def lazily_negated(*shape):
    x = torch.randn(*shape, dtype=torch.cfloat).conj().imag
    assert x.is_neg()
    return x


@pytest.mark.parametrize(
    ("mechanism", "name", "shape"),
    [
        ("elu", "head_scale", (2,)),
        ("weighted_identity", "key_weights", (1, 6, 2, 1)),
        ("gated_identity", "key_weights", (1, 6, 2, 8)),
        ("elu", "gradient", (1, 6, 2, 8)),
    ],
)
def test_signs_that_are_not_in_memory_yet(mechanism, name, shape):
    q = torch.randn(1, 6, 2, 8, requires_grad=True)
    lazy = lazily_negated(*shape)
    results = []
    for x, backend in ((lazy, "triton"), (lazy.resolve_neg(), "eager")):
        terms = {} if name == "gradient" else {name: x}
        out = ops.linear_attention(q, q, q, mechanism=mechanism, **terms, backend=backend)
        grad = x if name == "gradient" else torch.ones_like(out)
        results.append((out, *torch.autograd.grad(out, q, grad)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_signs_of_the_gradient_of_a_read():
    q = torch.randn(1, 6, 2, 8, requires_grad=True)
    state = ops.linear_attention_state(q.detach(), q.detach())
    lazy, found = lazily_negated(1, 6, 2, 8), []
    for grad, backend in ((lazy, "triton"), (lazy.resolve_neg(), "eager")):
        out = ops.read_linear_attention_state(q, state, backend=backend)
        found += torch.autograd.grad(out, q, grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
