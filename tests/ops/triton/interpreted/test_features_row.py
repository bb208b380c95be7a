"""Features that the caller makes, in the interpreter: the row that `MECHANISMS` does not list."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_features_row import FEATURES, positive_inputs
from tests.ops.triton.cases import error, many_splits, reference, run


@pytest.mark.parametrize("splits", [False, True], ids=["one kernel", "splits"])
def test_definition(splits, monkeypatch):
    if splits:
        many_splits(monkeypatch)
    inputs = positive_inputs(grid=(5, 9), dim=20, batch=1, dtype=torch.float32, mask=True)
    expected_out, expected_grad = reference(FEATURES, inputs)
    out, grad = run(FEATURES, inputs)
    assert error(out, expected_out) < 3e-6
    assert error(grad, expected_grad) < 3e-6
