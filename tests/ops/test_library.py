"""The registered operators: opcheck, tracing, export, scripting, FLOP counts."""

from __future__ import annotations

import runpy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.golden import relative_error
from tests.ops.checks import each_check
from tests.ops.inputs import (
    ATTENTIONS,
    BACKENDS,
    attend,
    make_inputs,
    operator_arguments,
    oracle,
)
from tests.pairwise import pairwise
from vitlinear import ops
from vitlinear.ops import backend as backend_module
from vitlinear.ops import backward, eager

each_attention = pytest.mark.parametrize("attention", ATTENTIONS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


# Mask, rotary and heads: every pair of two options' values, and the one where strides are most
# ambiguous.
OPTIONS = [(False, False, 1), (False, True, 3), (True, False, 3), (True, True, 1)]


@each_check(
    "attention, mask, rotary, heads",
    [(attention, *options) for attention in ATTENTIONS for options in OPTIONS],
    traced=[(name, *OPTIONS[place % len(OPTIONS)]) for place, name in enumerate(ATTENTIONS)],
)
def test_opcheck(attention, mask, rotary, heads, checks):
    inputs = make_inputs(mask=mask, rotary=rotary, heads=heads, dtype=torch.float32)
    operator, arguments = operator_arguments(attention, inputs)
    torch.library.opcheck(operator, arguments, test_utils=checks)


@each_check("mechanism", [(name,) for name in ops.MECHANISMS], traced=[("mala",)])
def test_opcheck_with_head_scale(mechanism, checks):
    inputs = make_inputs(dtype=torch.float32)
    inputs = inputs._replace(head_scale=torch.rand(2, requires_grad=True))
    operator, arguments = operator_arguments(mechanism, inputs)
    torch.library.opcheck(operator, arguments, test_utils=checks)


@each_check("attention", [(name,) for name in ATTENTIONS], traced=[("nala",), ("softmax",)])
def test_opcheck_backward_with_strided_gradient(attention, checks):
    inputs = make_inputs(dtype=torch.float32, mask=True)
    operator, arguments = operator_arguments(attention, inputs)
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    outputs = operator(*arguments)
    grad = inputs.grad.transpose(1, 3).contiguous().transpose(1, 3)
    assert not grad.is_contiguous()
    if attention == "softmax":
        operator = torch.ops.vitlinear.softmax_attention_backward.default
        arguments = (grad, *arguments, *outputs)
    else:
        operator = torch.ops.vitlinear.linear_attention_backward.default
        arguments = (grad, *arguments, *outputs[1:])
    torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.compile
@pairwise(every=2, attention=ATTENTIONS, backend=BACKENDS)
def test_compile_fullgraph(attention, backend):
    inputs = make_inputs(grid=(4, 6), mask=True)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    out = compiled(attention, inputs, backend)
    (grad,) = torch.autograd.grad(out, inputs.projection, inputs.grad)
    expected_out, expected_grad = oracle(attention, inputs)
    assert relative_error(out, expected_out) < 1e-12
    assert relative_error(grad, expected_grad) < 1e-12


@pytest.mark.nightly
@pytest.mark.process
@pytest.mark.compile
@pytest.mark.slow
def test_eager_formula_compiles_with_inductor():
    """The real compiler, forward and backward, in float32 as models run."""
    inputs = make_inputs(grid=(4, 6), dtype=torch.float32)
    out = torch.compile(attend, fullgraph=True)("rala", inputs, "eager")
    (grad,) = torch.autograd.grad(out, inputs.projection, inputs.grad)
    expected_out, expected_grad = oracle("rala", inputs)
    assert relative_error(out, expected_out) < 1e-5
    assert relative_error(grad, expected_grad) < 1e-5


class Attention(nn.Module):
    """An attention over a map [B, H, W, 3 h D] as a module, for exporters."""

    def __init__(self, attention: str, backend: str) -> None:
        super().__init__()
        self.attention, self.backend = attention, backend
        self.powers = nn.Parameter(torch.rand(2, 8) + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, _ = x.shape
        q, k, v = x.reshape(batch, height * width, 3, 2, 8).unbind(2)
        tables = ops.lrpe_tables if self.attention == "lightnet" else ops.rotary_tables
        rotary = tables(height, width, 8, x.device, torch.float32)
        rotary, powers = (None, self.powers) if self.attention == "pola" else (rotary, None)
        if self.attention == "softmax":
            return ops.softmax_attention(q, k, v, rotary=rotary, backend=self.backend)
        return ops.linear_attention(
            q, k, v, mechanism=self.attention, rotary=rotary, powers=powers, backend=self.backend
        )


@pairwise(every=2, backend=BACKENDS, attention=ATTENTIONS)
def test_export_any_size(attention, backend):
    module = Attention(attention, backend)
    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in "bhw")
    program = torch.export.export(
        module,
        (torch.randn(2, 5, 6, 48),),
        dynamic_shapes={"x": {0: batch, 1: height, 2: width}},
    )
    for shape in ((2, 5, 6, 48), (3, 9, 4, 48)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)


def scripted_rala(q, k, v, rows, cols):
    return torch.ops.vitlinear.linear_attention(q, k, v, "rala", rows, cols)[0]


def scripted_softmax(q, k, v, rows, cols):
    return torch.ops.vitlinear.softmax_attention(q, k, v, rows, cols, None)[0]


@pytest.mark.parametrize("function", [scripted_rala, scripted_softmax])
def test_script_through_registered_operator(function):
    inputs = make_inputs()
    q, k, v, _ = inputs.projection.unbind(2)
    out = torch.jit.script(function)(q, k, v, *inputs.rotary)
    expected_out, expected_grad = oracle(function.__name__.removeprefix("scripted_"), inputs)
    (grad,) = torch.autograd.grad(out, inputs.projection, inputs.grad)
    assert relative_error(out, expected_out) < 1e-12
    assert relative_error(grad, expected_grad) < 1e-12


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_flop_formula_counts_what_runs(attention):
    """The formulas say what PyTorch's counter sees in the plain computation."""
    inputs = make_inputs(grid=(6, 7), mask=True)
    operator, arguments = operator_arguments(attention, inputs)
    with FlopCounterMode(display=False) as registered:
        out = operator(*arguments)[0]
    with FlopCounterMode(display=False) as registered_backward:
        torch.autograd.grad(out, inputs.projection, inputs.grad)

    q, k, v, *_ = inputs.projection.detach().unbind(2)
    row = None if attention == "softmax" else ops.get_mechanism(attention)
    tokens = eager.prepare(q, k, v, row, inputs.terms(attention), own=True)
    grad = inputs.grad.transpose(1, 2)
    with FlopCounterMode(display=False) as plain:
        if attention == "softmax":
            saved = backward.softmax_attention_forward(tokens)
        else:
            _, saved = eager.linear_attention_forward(tokens, row)
    with FlopCounterMode(display=False) as plain_backward:
        if attention == "softmax":
            backward.softmax_attention_backward(grad, tokens, *saved)
        else:
            backward.linear_attention_backward(grad, tokens, row, saved)
    assert registered.get_total_flops() == plain.get_total_flops() > 0
    assert registered_backward.get_total_flops() == plain_backward.get_total_flops() > 0


def test_softmax_operator_in_chunks(monkeypatch):
    """Queries beyond one chunk meet all keys."""
    monkeypatch.setattr(backward, "QUERY_CHUNK", 7)
    inputs = make_inputs(grid=(5, 6), mask=True)
    out = attend("softmax", inputs, "library")
    (grad,) = torch.autograd.grad(out, inputs.projection, inputs.grad)
    expected_out, expected_grad = oracle("softmax", inputs)
    assert relative_error(out, expected_out) < 1e-12
    assert relative_error(grad, expected_grad) < 1e-12


@pytest.mark.quick
def test_library_keeps_only_inputs_and_state():
    """A forward pass leaves no more for backward for more tokens."""
    kept = {}
    for grid in ((4, 4), (16, 16)):
        inputs = make_inputs(grid=grid, dtype=torch.float32)
        q, k, v, _ = inputs.projection.unbind(2)
        inside = {x.untyped_storage().data_ptr() for x in (q, k, v)}
        inside |= {x.untyped_storage().data_ptr() for x in inputs.rotary}
        sizes = []

        def pack(x, inside=inside, sizes=sizes):
            if x.untyped_storage().data_ptr() not in inside:
                sizes.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            ops.linear_attention(q, k, v, mechanism="rala", rotary=inputs.rotary, backend="library")
        kept[grid] = sum(sizes)
    assert kept[(4, 4)] == kept[(16, 16)] > 0


@pytest.mark.quick
def test_argument_wins_over_environment(monkeypatch):
    assert ops.choose_backend().backend == "eager"
    monkeypatch.setattr(backend_module, "_from_environment", "library")
    assert ops.choose_backend() == ("library", "set by VITLINEAR_BACKEND")
    assert ops.choose_backend("eager") == ("eager", "asked for by argument")


@pytest.mark.parametrize(
    "value, shown", [("library", "library"), ("", "eager"), ("warp", "unknown VITLINEAR_BACKEND")]
)
def test_environment_is_read(value, shown, monkeypatch):
    """When the module is imported: here, a second time."""
    monkeypatch.setenv("VITLINEAR_BACKEND", value)
    fresh = runpy.run_module(backend_module.__name__)
    if value == "warp":
        with pytest.raises(ValueError, match=shown):
            fresh["choose_backend"]()
    else:
        assert fresh["choose_backend"]().backend == shown
