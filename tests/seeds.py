"""Pytest hooks: each test draws the same random numbers at each run, alone or after others.

A red run is then one that anybody can repeat: with a generator that goes on from test to test,
its numbers depend on which tests the same process of pytest-xdist happened to run before.
"""

import random
import zlib
from collections.abc import Generator
from typing import Any

import numpy
import pytest
import torch

_NODE = pytest.StashKey[str]()


def seed(name: str) -> None:
    """Begin all generators anew with a seed of this name."""
    number = zlib.crc32(name.encode())
    random.seed(number)
    numpy.random.seed(number)
    torch.manual_seed(number)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.stash[_NODE] = item.nodeid
    seed(item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, Any, Any]:
    """Fixtures that several tests share: the same numbers, whichever test asks for it first."""
    if fixturedef.scope == "function":
        return (yield)
    seed(f"{fixturedef.baseid}::{fixturedef.argname}[{getattr(request, 'param_index', 0)}]")
    try:
        return (yield)
    finally:
        seed(request.config.stash[_NODE])
