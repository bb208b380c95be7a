"""A model on the rows of several processes equals itself on the whole image."""

import pytest
import torch

from tests.parallel.comparing import worst_differences
from tests.parallel.ranks import Ranks

# Even, odd and uneven at every stride; the last ones are not at multiples of one.
TWO = [(64, 64), (64, 41), (50, 55)]


def check(ranks: Ranks, *args: object, tolerance: float = 1e-10, **kwargs: object) -> None:
    for worst in ranks.run(_differences, args, kwargs):
        assert worst == pytest.approx(dict.fromkeys(worst, 0), abs=tolerance)


def _differences(args: tuple, kwargs: dict) -> dict[str, float]:
    return worst_differences(*args, **kwargs)


@pytest.mark.process
@pytest.mark.parametrize("name", ["test_ravlt_linear", "test_mavit_linear"])
def test_two(two, name):
    check(two, name, (64, 41))


@pytest.mark.process
def test_single_precision(two):
    check(two, "test_ravlt_linear", (64, 64), dtype=torch.float32, tolerance=1e-5)


@pytest.mark.process
def test_checkpointing_with_backward_outside(two):
    check(two, "test_mavit_linear", (50, 55), checkpointing=True)
