"""Runs the tests in ``interpreted/`` in processes of their own, some files in each.

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
# As many as tests run in by default: imports are the smallest part of the time there.
PROCESSES = 2
TOGETHER = [FILES[i::PROCESSES] for i in range(PROCESSES)]
IN_QUICK = "test_mechanisms.py"  # has the quick tests: the others would be found empty


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(3000)  # half of all that is interpreted, and in nightly runs more of it
@pytest.mark.parametrize(
    "files",
    [
        pytest.param(
            files, marks=pytest.mark.quick if IN_QUICK in files else (), id=",".join(files)
        )
        for files in TOGETHER
    ],
)
def test_interpreted(files, pytestconfig):
    """With the outer run's choice, so that ``-m "not slow"`` leaves out the slow ones inside."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-m", pytestconfig.getoption("markexpr")]
    command += [str(HERE / "interpreted" / file) for file in files]
    command += [flag for flag in ("--quick", "--nightly") if pytestconfig.getoption(flag)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    # What pytest-xdist tells its own processes.
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        command, env=environment, cwd=HERE.parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
