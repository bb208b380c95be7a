"""SIGKILL at random moments of a real run; the committed measurement has more of them."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.process
@pytest.mark.slow
def test_a_killed_run_ends_as_one_left_alone() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "benchmarks/kill_test.py", "--kills", "2", "--epochs", "2"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills" in done.stdout and ", 0 differ" in done.stdout
