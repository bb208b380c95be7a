"""Operator tests run with poisoned memory: what an operator forgets to write is NaN, not luck."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill fresh memory with NaN, and with the largest integer, while a test runs."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
