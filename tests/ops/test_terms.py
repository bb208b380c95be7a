"""One order of the terms of an attention, from the public function to the launch of a kernel."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

from tests.ops.inputs import make_inputs, oracle
from vitlinear import ops
from vitlinear.layers.attention.scriptable import scriptable_attention
from vitlinear.ops import backward, eager, naive, registered
from vitlinear.ops.attention_state import LinearAttentionState
from vitlinear.ops.terms import FlatTerms, Terms

TOKENS = ["q", "k", "v"]
STATE = list(LinearAttentionState._fields)


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def operator_parameters(name: str) -> list[str]:
    schema = getattr(torch.ops.vitlinear, name).default._schema
    return [argument.name for argument in schema.arguments]


@pytest.mark.parametrize("function", [ops.linear_attention, ops.softmax_attention])
def test_what_follows_v_is_named(function):
    *tokens, first, _ = inspect.signature(function).parameters.values()
    assert [p.name for p in tokens[:3]] == TOKENS
    assert all(p.kind is p.KEYWORD_ONLY for p in (*tokens[3:], first))
    x = torch.zeros(1, 2, 1, 8)
    with pytest.raises(TypeError, match="positional"):
        function(x, x, x, None)


def test_one_order():
    terms, flat = list(Terms._fields), list(FlatTerms._fields)
    assert flat == ["rows", "cols", *terms[1:]]
    assert parameters(ops.linear_attention) == [*TOKENS, "mechanism", *terms, "backend"]
    assert parameters(ops.softmax_attention) == [*TOKENS, *terms[:2], "backend"]
    assert parameters(scriptable_attention) == [*TOKENS, "attn_type", *terms, "backend"]
    assert parameters(naive.linear_attention) == [*TOKENS, "mechanism", *terms]
    assert parameters(naive.softmax_attention) == [*TOKENS, *terms[:2]]
    assert parameters(eager.linear_attention) == [*TOKENS, "mechanism", "terms"]
    assert parameters(eager.prepare)[:5] == [*TOKENS, "mechanism", "terms"]
    arguments = [*TOKENS, "mechanism", *flat]
    assert operator_parameters("linear_attention") == [*arguments, "backend"]
    backward_arguments = ["grad_out", *arguments, *STATE, "backend"]
    assert operator_parameters("linear_attention_backward") == backward_arguments
    assert operator_parameters("softmax_attention") == [*TOKENS, *flat[:3]]


def test_kernels_take_the_same_order():
    pytest.importorskip("triton")
    launch = importlib.import_module("vitlinear.ops.triton.launch")
    assert parameters(launch.forward) == [
        *TOKENS,
        "mechanism",
        "terms",
        "separate",
        "vectors",
        "memo",
    ]
    assert parameters(launch.backward) == [
        "grad_out", *TOKENS, "mechanism", "terms", "state", "grads", "memo",
    ]  # fmt: skip


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("epilogue", [(), ("lepe",), ("gate",)])
def test_terms_come_back_from_flat_ones(rotary, mask, epilogue):
    terms = make_inputs(rotary=rotary, mask=mask, epilogue=epilogue).terms("mala")
    flat = terms.flatten()
    assert isinstance(flat, FlatTerms)
    assert flat.key_padding_mask is terms.key_padding_mask
    assert (flat.lepe is not None, flat.gate is not None) == (
        "lepe" in epilogue,
        "gate" in epilogue,
    )
    back = Terms.unflatten(*flat)
    assert type(back.rotary) is type(terms.rotary)
    assert all(a is b for a, b in zip(back.flatten(), flat, strict=True))
    assert all(a is b for a, b in zip(back[1:], terms[1:], strict=True))


@pytest.mark.parametrize("mechanism", list(ops.MECHANISMS))
def test_state_comes_back_from_a_flat_one(mechanism):
    inputs, row = make_inputs(), ops.get_mechanism(mechanism)
    q, k, v, *_ = inputs.projection.detach().unbind(2)
    tokens = eager.prepare(q, k, v, row, inputs.terms(mechanism), own=True)
    _, state = eager.linear_attention_forward(tokens, row)
    flat = state.flatten()
    assert all(x.is_contiguous() for x in flat)
    back = LinearAttentionState.unflatten(*flat)
    for a, b in zip(back, state, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_gradients_have_the_names_of_the_terms():
    assert [*backward.LinearGradients._fields] == [*TOKENS, *Terms._fields[2:]]


def test_a_gradient_for_each_argument_of_the_operator():
    """Each in its place: of q, k, v, tau, lepe and gate, and none of the others."""
    inputs = make_inputs(mask=True, epilogue=("lepe", "gate"))
    scale = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    inputs = inputs._replace(head_scale=scale)
    terms = inputs.terms("mala")
    q, k, v, *_ = inputs.projection.unbind(2)
    out = registered.linear_attention_op(q, k, v, "mala", *terms.flatten())[0]
    found = torch.autograd.grad(out, [inputs.projection, scale], inputs.grad)
    expected_out, expected_grad = oracle("mala", inputs)
    plain = eager.linear_attention(q, k, v, ops.get_mechanism("mala"), terms)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(found[0], expected_grad)
    torch.testing.assert_close(found[1], torch.autograd.grad(plain, scale, inputs.grad)[0])
