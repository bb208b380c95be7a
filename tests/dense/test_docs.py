"""docs/dense.md is a program that runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "dense.md"


@pytest.mark.slow
def test_code_of_the_page(capsys):
    """All of it, in order; it prints what its comments say."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    code = "\n".join(blocks)
    names: dict = {}
    exec(compile(code, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    for line in ("64 (2, 64, 32, 48)", "(128, 256, 512) (8, 16, 32)", "(48, 96, 192, 192) (4,"):
        assert line in printed and line in code
    assert all(loss.isfinite() for loss in names["losses"].values())
    assert all(x.isfinite().all() for x in names["maps"])
