"""The transcriptions that benchmarks compare with compute the same thing."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_rows
from tests.golden import relative_error
from tests.ops.inputs import make_inputs, oracle
from vitlinear import ops


@pytest.mark.parametrize("mechanism", list(ops.MECHANISMS))
@pytest.mark.parametrize("epilogue", [(), ("lepe", "gate")], ids=["bare", "epilogue"])
def test_transcription_is_the_definition(mechanism, epilogue):
    inputs = make_inputs(grid=(5, 7), dim=12, epilogue=epilogue)
    shape = gpu_rows.Shape("here", mechanism, 2, 5, 7, 2, 12)
    terms = inputs.terms(mechanism)
    attend = gpu_rows.transcription(shape, terms.rotary, torch.float64, terms.powers)
    parts = inputs.projection.unbind(2)
    out = attend(*(parts if epilogue else parts[:3]))
    (grad,) = torch.autograd.grad(out, inputs.projection, inputs.grad)
    expected_out, expected_grad = oracle(mechanism, inputs)
    assert relative_error(out, expected_out) < 1e-12
    assert relative_error(grad, expected_grad) < 1e-9


@pytest.mark.parametrize("mechanism", list(ops.MECHANISMS))
def test_every_mechanism_is_measured(mechanism):
    shapes = [shape for shape in gpu_rows.SHAPES if shape.mechanism == mechanism]
    assert shapes and all(shape.moved() >= shape.minimum() for shape in shapes)
