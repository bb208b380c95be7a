"""Rows that attentions by name are made of, in the interpreter; `MECHANISMS` does not list them."""

from __future__ import annotations

import torch

from tests.ops.test_mixer_rows import each_row, positive_inputs
from tests.ops.triton.cases import error, many_splits, reference, run


def check(row: str) -> None:
    inputs = positive_inputs(grid=(5, 9), dim=20, batch=1, dtype=torch.float32, mask=True)
    if row == "signed_features":  # sums of both signs; the third slice is the values
        signs = torch.ones_like(inputs.projection)
        signs[:, ::2, 0] = -1
        signed = (inputs.projection.detach() * signs).requires_grad_()
        inputs = inputs._replace(projection=signed)
    expected_out, expected_grad = reference(row, inputs)
    out, grad = run(row, inputs)
    assert error(out, expected_out) < 3e-6
    assert error(grad, expected_grad) < 3e-6


@each_row
def test_definition(row):
    check(row)


def test_splits(monkeypatch):
    many_splits(monkeypatch)
    check("softmax_halves")
