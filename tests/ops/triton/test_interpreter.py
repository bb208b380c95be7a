"""Runs the tests in ``interpreted/``, each file in a process of its own.

Triton decides when it is imported whether kernels are compiled or interpreted, so the environment
has to say so before; and what it says must not reach other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
FILES = sorted(path.name for path in (HERE / "interpreted").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=str)
def test_interpreted(file, slow):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-m", "slow" if slow else "not slow", str(HERE / "interpreted" / file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    # What pytest-xdist tells its own processes.
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        command, env=environment, cwd=HERE.parents[2], capture_output=True, text=True, check=False
    )
    nothing_there = 5
    assert done.returncode in ((0, nothing_there) if slow else (0,)), done.stdout + done.stderr
