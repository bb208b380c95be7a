"""(out + lepe) * gate in the same call: against the oracle, registered, exported, refused."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.golden import relative_error
from tests.ops.checks import each_check
from tests.ops.inputs import BACKENDS, attend, make_inputs, operator_arguments, oracle
from vitlinear import ops
from vitlinear.ops import backward, eager

each_mechanism = pytest.mark.parametrize("mechanism", list(ops.MECHANISMS))
each_backend = pytest.mark.parametrize("backend", BACKENDS)
CEILING = {torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BOTH = ("lepe", "gate")


@each_mechanism
@each_backend
@pytest.mark.parametrize("epilogue", [BOTH, ("lepe",), ("gate",)], ids="+".join)
@pytest.mark.parametrize("dtype", list(CEILING), ids=str)
def test_matches_oracle(mechanism, backend, epilogue, dtype):
    inputs = make_inputs(grid=(5, 7), dim=12, dtype=dtype, mask=True, epilogue=epilogue)
    expected_out, expected_grad = oracle(mechanism, inputs)
    spoilt = inputs.projection.masked_fill(inputs.mask[:, :, None, None, None], torch.nan)
    spoilt = spoilt.detach().requires_grad_()
    out = attend(mechanism, inputs, backend, spoilt)
    (grad,) = torch.autograd.grad(out, spoilt, inputs.grad)
    assert out.dtype == dtype
    assert relative_error(out, expected_out) < CEILING[dtype]
    assert relative_error(grad, expected_grad) < CEILING[dtype]


@each_backend
def test_gradcheck(backend):
    inputs = make_inputs(grid=(2, 3), dim=4, mask=True, epilogue=BOTH)
    assert torch.autograd.gradcheck(
        lambda projection: attend("mala", inputs, backend, projection),
        inputs.projection,
        fast_mode=True,
    )


@each_backend
def test_float16_saturates(backend):
    inputs = make_inputs(dtype=torch.float16, scale=1e4, epilogue=BOTH)
    out = attend("elu", inputs, backend)
    (grad,) = torch.autograd.grad(out, inputs.projection, inputs.grad)
    assert out.isfinite().all() and out.abs().max() == 65504
    assert grad.isfinite().all()


@each_check(
    "mechanism, epilogue",
    product(["rala", "mala", "lightnet"], ["lepe+gate", "lepe", "gate"]),
    traced=[("rala", "lepe+gate"), ("mala", "lepe"), ("lightnet", "gate")],
)
def test_opcheck(mechanism, epilogue, checks):
    inputs = make_inputs(dtype=torch.float32, mask=True, epilogue=tuple(epilogue.split("+")))
    operator, arguments = operator_arguments(mechanism, inputs)
    torch.library.opcheck(operator, arguments, test_utils=checks)
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    _, *saved = operator(*arguments)
    arguments = (inputs.grad, *arguments, *saved)
    operator = torch.ops.vitlinear.linear_attention_backward.default
    torch.library.opcheck(operator, arguments, test_utils=checks)


@each_mechanism
def test_flop_formula_counts_what_runs(mechanism):
    inputs = make_inputs(grid=(6, 7), epilogue=BOTH)
    q, k, v, *_ = inputs.projection.detach().unbind(2)
    row = ops.get_mechanism(mechanism)
    out = attend(mechanism, inputs, "library")
    with FlopCounterMode(display=False) as registered:
        torch.autograd.grad(out, inputs.projection, inputs.grad)
    terms = inputs.terms(mechanism, inputs.projection.detach())
    tokens = eager.prepare(q, k, v, row, terms, own=True)
    _, saved = eager.linear_attention_forward(tokens, row)
    with FlopCounterMode(display=False) as plain:
        backward.linear_attention_backward(inputs.grad.transpose(1, 2), tokens, row, saved)
    assert registered.get_total_flops() == plain.get_total_flops() > 0


class Attention(nn.Module):
    """A gated attention over a map [B, H, W, 5 h D]."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, _ = x.shape
        q, k, v, o, lepe = x.reshape(batch, height * width, 5, 2, 8).unbind(2)
        rotary = ops.rotary_tables(height, width, 8, x.device, torch.float32)
        return ops.linear_attention(
            q, k, v, mechanism="mala", rotary=rotary, lepe=lepe, gate=o, backend=self.backend
        )


@each_backend
def test_export_any_size(backend):
    module = Attention(backend)
    sizes = {1: torch.export.Dim("h", min=2, max=64), 2: torch.export.Dim("w", min=2, max=64)}
    program = torch.export.export(module, (torch.randn(2, 5, 6, 80),), dynamic_shapes=(sizes,))
    x = torch.randn(2, 9, 4, 80)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.compile
@each_backend
def test_compile_fullgraph(backend):
    inputs = make_inputs(grid=(4, 6), epilogue=BOTH)
    out = torch.compile(attend, backend="aot_eager", fullgraph=True)("rala", inputs, backend)
    (grad,) = torch.autograd.grad(out, inputs.projection, inputs.grad)
    expected_out, expected_grad = oracle("rala", inputs)
    assert relative_error(out, expected_out) < 1e-12
    assert relative_error(grad, expected_grad) < 1e-12


@pytest.mark.parametrize("name", BOTH)
def test_shapes_and_types_must_fit(name):
    x = torch.randn(2, 6, 2, 8)
    with pytest.raises(ValueError, match=f"{name} must have the shape and type of the output"):
        ops.linear_attention(x, x, x, **{name: x[:, :, :1]})
    with pytest.raises(ValueError, match=f"{name} must have the shape and type of the output"):
        ops.linear_attention(x, x, x, **{name: x.half()})


@each_backend
def test_distributed_and_checkpointed(backend, process_group):
    """The same gradients under DistributedDataParallel and gradient checkpointing as without."""
    module = nn.Sequential(nn.Linear(10, 80), Attention(backend), nn.Flatten(2), nn.Linear(16, 3))
    x = torch.randn(2, 3, 4, 10)

    def gradients(call) -> list[torch.Tensor]:
        module.zero_grad()
        call(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in module.parameters()]

    expected = gradients(module)
    found = [gradients(lambda x: checkpoint(module, x, use_reentrant=False))]
    found.append(gradients(nn.parallel.DistributedDataParallel(module)))
    for grads in found:
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b)
