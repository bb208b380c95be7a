"""Linear attention in two steps: states that are returned, and states that are given."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.golden import relative_error
from tests.ops.checks import each_check, each_gradcheck
from tests.ops.inputs import BACKENDS, Inputs, attend, double, make_inputs, oracle
from vitlinear import ops
from vitlinear.ops import naive
from vitlinear.ops.cpu import products

MECHANISMS = [name for name, row in ops.MECHANISMS.items() if not row.has_global_query]

each_mechanism = pytest.mark.parametrize("mechanism", MECHANISMS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def in_two_steps(mechanism: str, inputs: Inputs, backend: str) -> torch.Tensor:
    """The attention of `attend`, by a state and a read of it."""
    q, k, v, *_ = inputs.projection.unbind(2)
    terms = inputs.terms(mechanism)._asdict()
    of_keys = {name: terms[name] for name in ("rotary", "key_padding_mask", "powers")}
    of_keys["key_weights"] = terms.pop("key_weights")
    state = ops.linear_attention_state(k, v, mechanism=mechanism, **of_keys, backend=backend)
    return ops.read_linear_attention_state(q, state, mechanism=mechanism, **terms, backend=backend)


@pytest.mark.quick
@each_mechanism
@each_backend
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("epilogue", [("gate",), ("gate", "lepe")], ids="+".join)
def test_two_steps_are_the_attention(mechanism, backend, mask, epilogue):
    inputs = make_inputs(grid=(5, 7), dim=12, mask=mask, epilogue=epilogue)
    inputs = inputs._replace(head_scale=torch.tensor([0.5, -2.0], dtype=torch.float64))
    expected_out, expected_grad = oracle(mechanism, inputs)
    out = in_two_steps(mechanism, inputs, backend)
    (grad,) = torch.autograd.grad(out, inputs.projection, inputs.grad)
    assert relative_error(out, expected_out) < 1e-12
    assert relative_error(grad, expected_grad) < 1e-12


@each_gradcheck(
    "mechanism, backend", product(MECHANISMS, BACKENDS), slow=[("pola", name) for name in BACKENDS]
)
def test_gradcheck(mechanism, backend, fast):
    inputs = make_inputs(grid=(2, 3), dim=4, mask=True)
    assert torch.autograd.gradcheck(
        lambda p: in_two_steps(mechanism, inputs._replace(projection=p), backend),
        inputs.projection,
        fast_mode=fast,
    )


@each_mechanism
@each_backend
@pytest.mark.parametrize("width", [2, 20])
def test_values_narrower_and_wider_than_queries(mechanism, backend, width):
    inputs = make_inputs(grid=(3, 5), mask=True)
    q, k, *_ = inputs.projection.detach().unbind(2)
    q, k = q.requires_grad_(), k.requires_grad_()
    v = torch.randn(2, 15, 2, width, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(v)
    terms = inputs.terms(mechanism)
    expected = naive.linear_attention(q, k, v, mechanism, *terms)
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad)

    def two_steps():
        options = {"mechanism": mechanism, "rotary": terms.rotary, "backend": backend}
        options |= {"key_padding_mask": terms.key_padding_mask, "powers": terms.powers}
        state = ops.linear_attention_state(k, v, **options)
        return ops.read_linear_attention_state(q, state, **options)

    def at_once():
        options = terms._asdict()
        return ops.linear_attention(q, k, v, mechanism=mechanism, **options, backend=backend)

    for out in (at_once(), two_steps()):
        assert out.shape == v.shape and relative_error(out, expected) < 1e-12
        grads = torch.autograd.grad(out, (q, k, v), grad)
        for found, exact in zip(grads, expected_grads, strict=True):
            assert relative_error(found, exact) < 1e-12


@pytest.mark.quick
@each_backend
def test_state_of_identity_is_the_mean_of_products(backend):
    k, v = torch.randn(2, 2, 6, 3, 4, dtype=torch.float64).unbind(0)
    state = ops.linear_attention_state(k, v, mechanism="identity", backend=backend)
    expected = torch.einsum("bnhd,bnhe->bhde", k, v) / 6
    torch.testing.assert_close(state.state, expected)
    assert state[1:] == (None,) * 4


@each_backend
def test_states_that_samples_share(backend):
    """As a learned one, whose gradient is the sum over the samples."""
    q = torch.randn(3, 6, 2, 4, dtype=torch.float64)
    learned = torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    out = ops.read_linear_attention_state(
        q, ops.LinearAttentionState(learned), mechanism="identity", backend=backend
    )
    expected = torch.einsum("bnhd,hde->bnhe", q, learned[0])
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, learned, grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected, learned, grad)[0])


@each_backend
@torch.no_grad()
def test_states_that_samples_share_where_products_run_one_by_one(backend, monkeypatch):
    monkeypatch.setattr(products, "MKL_KEEPS_UP", False)
    q, learned = torch.randn(3, products.MATMUL_ROWS, 2, 4), torch.randn(1, 2, 4, 8)
    out = ops.read_linear_attention_state(
        q, ops.LinearAttentionState(learned), mechanism="identity", backend=backend
    )
    torch.testing.assert_close(out, torch.einsum("bnhd,hde->bnhe", q, learned[0]))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types(backend, dtype):
    """States are float32 whatever comes in, autocast or not, and outputs are like queries."""
    k = torch.randn(1, 5, 2, 4).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            state = ops.linear_attention_state(k, k, mechanism="mala", backend=backend)
            out = ops.read_linear_attention_state(k, state, mechanism="mala", backend=backend)
        assert {x.dtype for x in state if x is not None} == {wide}
        assert out.dtype == dtype
        expected = attend_once(k, backend)
        torch.testing.assert_close(out, expected)


def attend_once(x: torch.Tensor, backend: str) -> torch.Tensor:
    return ops.linear_attention(x, x, x, mechanism="mala", backend=backend)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_padding_alone(mechanism, backend, dtype):
    """A state of zeros, an output of zeros, and finite gradients."""
    inputs = make_inputs(dtype=dtype, mask=True)
    inputs.mask[0] = True
    projection = inputs.projection.detach().clone()
    projection[0] = torch.nan
    projection.requires_grad_()
    _, k, v, *_ = projection.unbind(2)
    terms = inputs.terms(mechanism)
    options = {"rotary": terms.rotary, "key_padding_mask": inputs.mask, "powers": terms.powers}
    state = ops.linear_attention_state(k, v, mechanism=mechanism, **options, backend=backend)
    assert not state.state[0].any() and state.state[1].any()
    out = in_two_steps(mechanism, inputs._replace(projection=projection), backend)
    (grad,) = torch.autograd.grad(out, projection, inputs.grad)
    assert not out[0].any() and not grad[0].any()
    assert out.isfinite().all() and grad.isfinite().all()


@each_check(
    "mechanism, mask",
    product(MECHANISMS, [False, True]),
    traced=[("mala", True), ("pola", False)],
)
def test_opcheck(mechanism, mask, checks):
    inputs = make_inputs(dtype=torch.float32, mask=mask, epilogue=("gate", "lepe"))
    q, k, v, *_ = inputs.projection.unbind(2)
    terms = inputs.terms(mechanism).flatten()
    arguments = (k, v, mechanism, *terms[:3], terms.powers)
    operators = torch.ops.vitlinear
    torch.library.opcheck(operators.linear_attention_state.default, arguments, test_utils=checks)
    state = operators.linear_attention_state(*arguments)
    given = ops.LinearAttentionState.unflatten(*(x.detach() for x in state))[:3]
    given = [None if x is None else x.requires_grad_() for x in given]
    arguments = (q, *given, mechanism, *terms[:-1])  # without weights of keys
    torch.library.opcheck(
        operators.read_linear_attention_state.default, arguments, test_utils=checks
    )


@each_mechanism
def test_gradients_of_a_state_itself(mechanism):
    """Of all that it holds, the logsumexp of a softmax over keys included."""
    inputs = make_inputs(mask=True)
    _, k, v, *_ = inputs.projection.unbind(2)
    terms = inputs.terms(mechanism)
    grads = {}
    for backend in BACKENDS:
        state = ops.linear_attention_state(
            k, v, mechanism=mechanism, rotary=terms.rotary, key_padding_mask=inputs.mask,
            powers=terms.powers, backend=backend,
        )  # fmt: skip
        loss = sum((x.sin() * x).sum() for x in state if x is not None)
        (grads[backend],) = torch.autograd.grad(loss, inputs.projection, retain_graph=True)
    assert relative_error(grads["library"], grads["eager"]) < 1e-12


@each_mechanism
@pytest.mark.parametrize("epilogue", [(), ("lepe",), ("gate", "lepe")], ids=str)
def test_flop_formulas_count_what_runs(mechanism, epilogue):
    inputs = make_inputs(grid=(6, 7), epilogue=epilogue)
    counts = {}
    for backend in BACKENDS:
        with FlopCounterMode(display=False) as counter:
            out = in_two_steps(mechanism, inputs, backend)
        counts[backend] = counter.get_total_flops()
    assert counts["library"] == counts["eager"] > 0
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out, inputs.projection, inputs.grad)
    once = attend(mechanism, inputs, "library")
    with FlopCounterMode(display=False) as whole:
        torch.autograd.grad(once, inputs.projection, inputs.grad)
    assert backward.get_total_flops() == whole.get_total_flops() > 0


@pytest.mark.compile
@pytest.mark.parametrize("mechanism", ["identity", "mala", "pola"])
@each_backend
def test_compile_fullgraph(mechanism, backend):
    inputs = make_inputs(grid=(4, 6), mask=True)
    compiled = torch.compile(in_two_steps, backend="aot_eager", fullgraph=True)
    out = compiled(mechanism, inputs, backend)
    (grad,) = torch.autograd.grad(out, inputs.projection, inputs.grad)
    expected_out, expected_grad = oracle(mechanism, inputs)
    assert relative_error(out, expected_out) < 1e-12
    assert relative_error(grad, expected_grad) < 1e-12


def test_library_refuses_what_it_has_not():
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(
            lambda k: ops.linear_attention_state(k, x, mechanism="identity", backend="library")[0],
            (x,),
            (x,),
        )


@each_mechanism
@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", ["zeros", "one token", "huge", "many tokens"])
def test_finite(mechanism, backend, dtype, case):
    """States of half precision are sums in float32: many tokens do not make them vanish."""
    grid = {"one token": (1, 1), "many tokens": (90, 100)}.get(case, (5, 6))
    inputs = make_inputs(grid=grid, dtype=dtype, batch=1, heads=1)
    projection = inputs.projection.detach()
    if case == "zeros":
        projection.zero_()
    elif case == "huge":
        projection[:, :, :2] *= 1e4
        projection[:, :, 2] *= 300
    projection.requires_grad_()
    out = in_two_steps(mechanism, inputs._replace(projection=projection), backend)
    (grad,) = torch.autograd.grad(out, projection, inputs.grad)
    assert out.isfinite().all() and grad.isfinite().all()
    if case == "zeros":
        assert not out.any()
    if case == "many tokens":
        tokens = inputs._replace(projection=projection)
        exact = attend(mechanism, in_float64(tokens), "eager")
        assert relative_error(out, exact) < {torch.bfloat16: 1e-2}.get(dtype, 2e-3)


def in_float64(inputs: Inputs) -> Inputs:
    """The same numbers in float64."""
    return inputs._replace(
        projection=inputs.projection.detach().double(),
        rotary=double(inputs.rotary),
        cosine=double(inputs.cosine),
    )


def test_a_mean_query_needs_queries():
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="'rala' weighs keys by their mean query and has no state"):
        ops.linear_attention_state(x, x, mechanism="rala")


BAD_STATES = {
    "needs norm in the state, and there is none": {"norm": None},
    "needs mean_v in the state": {"mean_v": None},
    r"state of the state must be \[2, 2, 8, 8\]": {"state": torch.zeros(2, 2, 6, 8)},
    r"must be \[2, 2, 8, 8\] for q": {"state": torch.zeros(3, 2, 8, 8)},
    "norm of the state must be torch.float32 for torch.float32, got torch.float16": {
        "norm": torch.zeros(2, 2, 1, 8).half()
    },
}


@pytest.mark.parametrize("message", BAD_STATES)
def test_states_that_do_not_fit(message):
    x = torch.randn(2, 6, 2, 8)
    state = ops.linear_attention_state(x, x, mechanism="mala")
    with pytest.raises(ValueError, match=message):
        ops.read_linear_attention_state(x, state._replace(**BAD_STATES[message]), mechanism="mala")


def test_terms_that_do_not_fit():
    x = torch.randn(2, 6, 2, 8)
    with pytest.raises(ValueError, match="4 x 2 grid do not fit 6 tokens"):
        ops.linear_attention_state(x, x, rotary=ops.rotary_tables(4, 2, 8))
    state = ops.linear_attention_state(x, x[..., :4])
    with pytest.raises(ValueError, match=r"gate must have the shape and type of the output"):
        ops.read_linear_attention_state(x, state, gate=x)
    with pytest.raises(ValueError, match="softmax attention takes values of the width of q"):
        ops.softmax_attention(x, x, x[..., :4])
