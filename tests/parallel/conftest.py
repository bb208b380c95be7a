"""Groups of processes for the tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.parallel.ranks import Ranks


def _group(size: int, factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(size, str(factory.mktemp("group") / "store"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes."""
    yield from _group(2, tmp_path_factory)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Three processes."""
    yield from _group(3, tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four processes."""
    yield from _group(4, tmp_path_factory)
