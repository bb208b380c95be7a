"""Commands that errors tell users to run."""

import shlex
from pathlib import Path

import pytest

from vitlinear import errors
from vitlinear.errors import pip_install


def test_an_extra_is_installed_from_where_this_package_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be in no package index, so a checkout names its folder."""
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "it's here/vitlinear/errors.py"))
    assert pip_install("train,geo") == "pip install 'vitlinear[train,geo]'"
    folder = tmp_path / "it's here"
    (folder / "vitlinear.egg-info").mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    assert shlex.split(pip_install("train")) == ["pip", "install", "-e", f"{folder}[train]"]
