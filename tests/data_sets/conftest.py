"""The fixture of the tests of data sets: their folder is not tests/data, which holds files."""

from pathlib import Path

import pytest

from tests.train.helpers import image_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder data set of three classes; tests only read it."""
    return image_folder(tmp_path_factory.mktemp("images"))
