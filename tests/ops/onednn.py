"""Helpers of tests of operators that run through oneDNN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch.profiler import ProfilerActivity, profile

from vitlinear.ops.cpu.products import onednn_available

needs_onednn = pytest.mark.skipif(not onednn_available(), reason="this PyTorch has no oneDNN")


def operators(run: Callable[[], object]) -> set[str]:
    """Names of the operators that a call runs."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        run()
    return {event.key for event in trace.key_averages()}
