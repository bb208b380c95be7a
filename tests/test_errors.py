"""Commands that errors tell users to run."""

import importlib.metadata
import shlex
from pathlib import Path

import pytest

from vitlinear.errors import pip_install


def test_an_extra_is_installed_from_where_this_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be in no package index, so a checkout that is not installed names its folder."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0")
    assert pip_install("train,geo") == "pip install 'vitlinear[train,geo]'"

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    folder, extra = shlex.split(pip_install("train"))[2].split("[")
    assert extra == "train]" and (Path(folder) / "pyproject.toml").is_file()
