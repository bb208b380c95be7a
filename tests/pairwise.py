"""Parametrisation of which nightly runs see all, and other runs pairs of values, or some."""

from collections.abc import Container, Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def cover(sizes: Iterable[int]) -> set[tuple[int, ...]]:
    """Rows of indices in which every two values of different axes occur together.

    Greedy: each row is the one that holds the most pairs not seen yet, the first of equals. So
    the rows are the same at each run.
    """
    numbers: dict[tuple[int, int, int, int], int] = {}
    pairs = {
        row: sum(
            1 << numbers.setdefault((i, row[i], j, row[j]), len(numbers))
            for i, j in combinations(range(len(row)), 2)
        )
        for row in product(*map(range, sizes))
    }
    missing, chosen = (1 << len(numbers)) - 1, set()
    while missing:
        row = max(pairs, key=lambda row: (pairs[row] & missing).bit_count())
        chosen.add(row)
        missing &= ~pairs[row]
    return chosen


def label(axis: str, value: Any) -> str:
    """A value's part of a test's name."""
    if isinstance(value, bool):
        return axis if value else f"no_{axis}"
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or f"no_{axis}"
    return str(value).removeprefix("torch.")


def pairwise(every: int = 1, **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrises with a product: every pair of values as a rule, the rest in nightly runs.

    Args:
        every: Leave that many times fewer to every run: as on a chessboard of the first two axes,
            so that every value has its turn. For tests that cost more than they find.
        axes: the values of each argument of the test.
    """
    values = [list(axis) for axis in axes.values()]
    chosen = {row for row in cover(map(len, values)) if (row[0] + row[1]) % every == 0}
    cases = []
    for places in product(*(range(len(axis)) for axis in values)):
        row = [axis[place] for axis, place in zip(values, places, strict=True)]
        name = "-".join(map(label, axes, row))
        marks = () if places in chosen else pytest.mark.nightly
        cases.append(pytest.param(*row, id=name, marks=marks))
    return pytest.mark.parametrize(list(axes), cases)


def some_by_night(
    name: str, values: Iterable[Any], every_run: Container[Any]
) -> pytest.MarkDecorator:
    """Parametrises with values of which all but some are left to nightly runs.

    Args:
        name: Of the test's argument, or of several with commas between.
        values: Of the argument; tuples of several arguments.
        every_run: Those that run every time.
    """
    cases = []
    for value in values:
        marks = () if value in every_run else pytest.mark.nightly
        if "," in name:
            row = "-".join(map(label, name.split(", "), value))
            cases.append(pytest.param(*value, marks=marks, id=row))
        else:
            cases.append(pytest.param(value, marks=marks))
    return pytest.mark.parametrize(name, cases)


def siblings_by_night(names: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrises with models; siblings that are linear throughout are left to nightly runs.

    They run the code of the others, which have linear stages too.
    """
    names = list(names)
    return some_by_night("name", names, [name for name in names if not name.endswith("_linear")])


def diagonal(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrises with a product: the first values together, the second ones, and so on.

    The other combinations are left to nightly runs.

    Args:
        axes: the values of each argument of the test, as many of each.
    """
    cases = list(product(*axes.values()))
    return some_by_night(", ".join(axes), cases, list(zip(*axes.values(), strict=True)))
