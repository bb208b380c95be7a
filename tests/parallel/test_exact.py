"""A model on the rows of several processes equals itself on the whole image."""

from itertools import product
from typing import Any

import pytest
import torch

from tests.parallel.comparing import worst_differences
from tests.parallel.ranks import Ranks
from tests.streaming.test_exact import MODELS

pytestmark = pytest.mark.process

# Even, odd and uneven at every stride; the last ones of each are not at multiples of one. Maps that
# round down have a row for each process too.
SIZES = {
    2: [(64, 64), (64, 41), (50, 55)],
    3: [(32, 32, 32), (64, 32, 43), (30, 33, 40)],
    4: [(32, 32, 32, 32), (32, 64, 32, 33), (30, 33, 31, 37)],
}


def check(
    ranks: Ranks,
    name: str,
    sizes: tuple[int, ...],
    training: bool = False,
    tolerance: float = 1e-10,
    **options: Any,
) -> None:
    """Compare everything with the whole image, on all processes."""
    for worst in ranks.run(worst_differences, name, sizes, training, options):
        assert worst == pytest.approx(dict.fromkeys(worst, 0), abs=tolerance)


def cases(count: int, every: int) -> pytest.MarkDecorator:
    """All models with all sizes, in training and not; of every n-th model one of these as a rule.

    Args:
        count: Number of processes.
        every: n.
    """
    sizes = SIZES[count]
    params = []
    for (i, name), size, training in product(enumerate(MODELS), sizes, (False, True)):
        chosen = (
            i % every == 0 and size == sizes[i // every % 3] and training == bool(i // every % 2)
        )
        marks = () if chosen else pytest.mark.nightly
        label = f"{name}-{'x'.join(map(str, size))}-{'training' if training else 'eval'}"
        params.append(pytest.param(name, size, training, id=label, marks=marks))
    return pytest.mark.parametrize(("name", "sizes", "training"), params)


@cases(2, every=2)
def test_two(two, name, sizes, training):
    check(two, name, sizes, training)


@cases(3, every=5)
def test_three(three, name, sizes, training):
    check(three, name, sizes, training)


@cases(4, every=100)
def test_four(four, name, sizes, training):
    check(four, name, sizes, training)


@pytest.mark.parametrize(
    "name",
    [
        name if name == "test_mavit_linear" else pytest.param(name, marks=pytest.mark.nightly)
        for name in MODELS
    ],
)
def test_single_precision(two, name):
    check(two, name, SIZES[2][0], dtype=torch.float32, tolerance=1e-5)


@pytest.mark.parametrize(
    "types",
    [
        ("flowformer", "kimi_delta", "hedgehog", "efficientvim"),
        pytest.param(("lla_uniform", "miras", "linfusion", "saga"), marks=pytest.mark.nightly),
        pytest.param(("lawcat", "focused", "efficientvit", "taylor"), marks=pytest.mark.nightly),
        pytest.param(("delta", "titans", "vssd", "transnormer"), marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_attentions_by_name(two, types):
    """In training, whose gradients go through the sums over all rows."""
    check(two, "test_ravlt", SIZES[2][1], training=True, attn_types=types)
