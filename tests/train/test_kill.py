"""SIGKILL at random moments of a real run; the committed measurement has more of them."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.nightly  # test_run.py ends a run at each of its writes in every run
@pytest.mark.parametrize(("kills", "epochs"), [(2, 2), (6, 4)])
def test_a_killed_run_ends_as_one_left_alone(kills: int, epochs: int) -> None:
    """Every other kill is to hit a write of the state."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "benchmarks/kill_test.py"]
    command += ["--kills", str(kills), "--epochs", str(epochs)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout and ", 0 differ" in done.stdout
