"""A checkpoint's worst content, shared by the tests of what reads files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class Payload:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return exec, (f"import pathlib; pathlib.Path({str(self.marker)!r}).touch()",)
