"""PyTorch's own checks of operators and gradients, whose costly forms some cases have every run."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest

# Parts of torch.library.opcheck. Those take some ten milliseconds; the last one traces forward
# and backward for any size, for nine tenths of the time.
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
TRACED = "test_aot_dispatch_dynamic"

Case = tuple[Any, ...]


def each_check(names: str, cases: Iterable[Case], traced: Container[Case]) -> pytest.MarkDecorator:
    """Parametrises with cases, and with `checks`, the parts of opcheck.

    Args:
        names: of a case's values, the test's arguments.
        cases: whose quick parts run every time.
        traced: cases whose costly part runs every time; it runs by night for the others.
    """
    return _two_forms(f"{names}, checks", cases, (QUICK, "quick"), (TRACED, "traced"), traced)


def each_gradcheck(
    names: str, cases: Iterable[Case], slow: Container[Case]
) -> pytest.MarkDecorator:
    """Parametrises with cases, and with `fast`, gradcheck's mode.

    The fast mode compares one number of the Jacobian's that all of its entries have a part in.

    Args:
        names: of a case's values, the test's arguments.
        cases: which run in fast mode every time.
        slow: cases that run in slow mode every time; the others do so by night.
    """
    return _two_forms(f"{names}, fast", cases, (True, "fast"), (False, "slow"), slow)


def _two_forms(
    names: str,
    cases: Iterable[Case],
    cheap: tuple[Any, str],
    costly: tuple[Any, str],
    every_run: Container[Case],
) -> pytest.MarkDecorator:
    rows = []
    for case in cases:
        name = "-".join(map(str, case))
        marks = () if case in every_run else pytest.mark.nightly
        rows.append(pytest.param(*case, cheap[0], id=f"{name}-{cheap[1]}"))
        rows.append(pytest.param(*case, costly[0], id=f"{name}-{costly[1]}", marks=marks))
    return pytest.mark.parametrize(names, rows)
