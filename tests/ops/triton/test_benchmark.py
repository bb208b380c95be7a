"""The GPU benchmark's script, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_dry_run(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry-run"]
    command += ["--only", "triton", "--output", str(output)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=tmp_path)
    record = json.loads(output.read_text())
    assert record["dry_run"] and len(record["rows"]) == 3
    assert all("forward_share" in row for row in record["rows"])
