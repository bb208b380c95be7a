"""Random numbers of tests: the same at each run, in any order (tests/seeds.py)."""

TESTS = """
import random

import numpy
import pytest
import torch


@pytest.fixture(scope="module", params=[1, 2])
def shared(request):
    return draw()


@pytest.fixture
def own():
    return draw()


def draw():
    return [random.random(), numpy.random.rand(), torch.rand(()).item()]


@pytest.mark.parametrize("case", [1, 2])
def test_one(shared, own, case, record):
    record(shared, own, draw())


def test_two(record):
    record(draw())
"""

PLUGIN = """
import json

import pytest

pytest_plugins = ["tests.seeds"]


@pytest.fixture
def record(request):
    return lambda *numbers: print(json.dumps([request.node.name, numbers]))
"""


def test_same_numbers_in_any_order(pytester):
    pytester.makeconftest(PLUGIN)
    path = pytester.makepyfile(TESTS)

    def numbers(*arguments: str) -> set[str]:
        result = pytester.runpytest_inprocess("-q", "-s", "-p", "no:cacheprovider", *arguments)
        return {line[line.index("[") :] for line in result.outlines if '["test' in line}

    every = numbers()
    assert len(every) == 5
    assert numbers(f"{path.name}::test_two", f"{path.name}::test_one") == every
    alone = numbers(f"{path.name}::test_one[2-2]")
    assert len(alone) == 1 and alone < every
    drawn = [number for line in every for number in line.partition(", ")[2].strip("[]").split(",")]
    assert len(set(drawn)) > len(every)
