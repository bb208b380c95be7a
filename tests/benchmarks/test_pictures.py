"""Benchmarks that draw a picture beside their results."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from vitlinear_cli import run


@pytest.mark.parametrize(
    ("name", "ending", "inputs", "needs"),
    [("seams", "png", ["wheel"], "PIL"), ("deepforest", "jpg", [], "mmdet")],
)
def test_a_picture_takes_no_other_files_place(
    name: str,
    ending: str,
    inputs: list[str],
    needs: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is trained."""
    pytest.importorskip(needs)
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(f"benchmarks.{name}").main
    (tmp_path / "link.json").symlink_to(tmp_path / f"link.{ending}")
    for file, says in (
        (f"a.{ending}", " beside it are both "),
        (f"a.{ending.upper()}", " beside it are both "),
        ("link.json", " beside it are both "),
        ("none/a.json", "its folder does not exist"),
        ("none/../a.json", "its folder does not exist"),
        (".", "it is a folder"),
    ):
        assert run(main, [*inputs, "--output", str(tmp_path / file)]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: ") and err.count("\n") == 1, err
        assert says in err
    assert [path.name for path in tmp_path.iterdir()] == ["link.json"]
