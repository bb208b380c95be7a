"""Shared by tests that train with mmdet and mmseg: the tools, run as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def command(tool: str, *arguments: object) -> list[str]:
    """A script of tools/ with its arguments."""
    return [sys.executable, str(ROOT / "tools" / tool), *(str(item) for item in arguments)]


def environment() -> dict[str, str]:
    """Variables for one thread and this checkout's code."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(folder: Path, tool: str, *arguments: object) -> str:
    """Runs a tool in a folder, which configs' paths are relative to, and returns what it said."""
    result = subprocess.run(
        command(tool, *arguments),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    return result.stdout


def metrics(work_dir: Path) -> dict[str, Any]:
    """The last line of numbers that a run left: those of its evaluation."""
    (path,) = work_dir.glob("*/vis_data/scalars.json")
    return dict(json.loads(path.read_text().splitlines()[-1]))
