"""Sentences that errors share, and commands that they tell users to run."""

import shlex
from pathlib import Path

import pytest

from vitlinear import errors
from vitlinear.cli.parser import Parser
from vitlinear.errors import UserError, check_choice, pip_install
from vitlinear.train.schedule import SCHEDULES, add_schedule_flags


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


def test_names_that_there_are_not_have_one_sentence() -> None:
    parser = Parser(prog="train")
    add_schedule_flags(parser)
    with pytest.raises(UserError) as of_name:
        check_choice("schedule", "it's", SCHEDULES)
    with pytest.raises(UserError) as of_flag:
        parser.parse_args(["--sched", "it's"])
    assert str(of_flag.value).startswith(f"argument --sched: {of_name.value}; ")
