"""The user's cache: what this machine has found out about the kernels, kept between processes.

A file for each GPU, driver, Triton and version of the code of `vitlinear.ops`, so that whatever
changes makes all of it be found out anew. It holds verdicts of the self-check (`self_check`),
measured times (`measurements`) and block sizes. Processes add to it under a lock, and it is
replaced whole. A file that cannot be read or written costs one warning, and what it would have
kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitlinear.errors import Notice, UserError, one_line
from vitlinear.files import write_text

from .gpu import Gpu
from .measurements import Measurement

try:
    import fcntl
except ImportError:  # Windows: files are still replaced whole, the last writer wins
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
SOURCES = Path(__file__).parent  # of kernels, of formulas, and of their comparison


@dataclass
class Known:
    """The content of a file.

    Attributes:
        checks: The label of a kind of call (`workload.Kind.label`) -> why its kernels failed the
            self-check; empty for those that passed.
        rows: Measured calls.
        blocks: The name of a kernel and its plan -> block of tokens, warps, stages, most registers.
    """

    checks: dict[str, str] = field(default_factory=dict)
    rows: list[Measurement] = field(default_factory=list)
    blocks: dict[str, list[int]] = field(default_factory=dict)


def folder() -> Path:
    """The folder of the files, which need not be there."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "vitlinear" / "kernels"


@functools.cache
def sources_hash() -> str:
    """A hash of the code of the kernels, and of what they are compared with."""
    total = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*.py")):
        name = path.relative_to(SOURCES).as_posix()
        total.update(name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:12]


def path_for(gpu: Gpu) -> Path:
    """The file for a GPU."""
    parts = (gpu.name, f"driver-{gpu.driver}", f"triton-{gpu.triton}", sources_hash())
    words = (re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-") for part in parts)
    return folder() / f"{'_'.join(words)}.json"


# What was read or learnt in this process, by path.
_known: dict[Path, Known] = {}
_complained: set[Path] = set()


def known(gpu: Gpu) -> Known:
    """All that is known of the kernels on a GPU; the file is read once a process."""
    path = path_for(gpu)
    if path not in _known:
        _known[path] = _read(path)
    return _known[path]


def add(gpu: Gpu, change: Callable[[Known], None]) -> Path | None:
    """Apply a change to what is known and to the file, which other processes may have added to.

    Returns:
        The file; None if it cannot be written, after one warning.
    """
    path = path_for(gpu)
    change(known(gpu))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            there = _read(path)
            change(there)
            write_text(path, json.dumps(_content(gpu, there), indent=1) + "\n")
        _known[path] = there
        return path
    except (OSError, UserError) as error:
        _complain(
            path,
            f"what was found out about the GPU kernels cannot be kept: {one_line(error)}; each "
            "process finds it out anew (XDG_CACHE_HOME names another folder)",
        )
        return None


def forget() -> None:
    """Read files anew."""
    _known.clear()
    _complained.clear()


def _content(gpu: Gpu, known: Known) -> dict[str, Any]:
    rows = [row._asdict() for row in known.rows]
    about = {"format": FORMAT, "gpu": gpu._asdict()}
    return {**about, "checks": known.checks, "rows": rows, "blocks": known.blocks}


def _read(path: Path) -> Known:
    """The content of a file; nothing if there is none or if it cannot be used, which is told."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return Known()
    except (OSError, UnicodeDecodeError) as error:
        _complain(path, f"{path} cannot be read and is left aside: {one_line(error)}")
        return Known()
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, not {FORMAT}")
        checks, blocks = content["checks"], content["blocks"]
        rows = [Measurement.of(row) for row in content["rows"]]
        if not all(isinstance(value, str) for value in checks.values()):
            raise ValueError("a check that is no text")
        if not all([type(n) for n in sizes] == [int] * 4 for sizes in blocks.values()):
            raise ValueError("block sizes that are not four numbers")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        _complain(path, f"{path} is damaged and is written anew: {reason}")
        return Known()
    return Known(checks, rows, blocks)


def _complain(path: Path, text: str) -> None:
    """Warn, once for a file."""
    if path not in _complained:
        _complained.add(path)
        warnings.warn(text, Notice, stacklevel=2)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes."""
    with open(path, "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing gives it back
