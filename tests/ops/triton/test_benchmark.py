"""The scripts of the GPU check, without a GPU; those of kernels run in interpreted/ too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import gpu_models, models_report  # noqa: E402
from benchmarks.subject import check_subject  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]


def dry_run(script, folder, *flags):
    """The rows that a script writes in a dry run."""
    output = folder / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--dry-run"]
    command += ["--output", str(output), *flags]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=folder)
    record = json.loads(output.read_text())
    assert record["dry_run"]
    return record["rows"]


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.nightly  # nearly half a minute; below its parts
def test_models(tmp_path):
    """Each model in inference and in a training step, one of them on the kernels."""
    rows = dry_run("gpu_models.py", tmp_path)
    assert [(row["task"], row["model"]) for row in rows] == [
        (task, name)
        for task in ("forward", "train")
        for name in ("test_ravlt", "test_ravlt@transcription", "test_ravlt@triton", "test_vit")
    ]
    assert all(row["images_per_s"] > 0 for row in rows)


def test_order_on_a_gpu():
    """Everything eager before anything compiled; nobody waits for a compiled transcription."""
    groups = list(gpu_models.GPU.groups())
    assert len(groups) == 12 and len(set(sum(groups, []))) == 4 * 8 + 8 * 6
    assert [{case.mode for case in cases} for cases in groups[::4]] == [
        {"eager"},
        {"compiled-as-is"},
        {"compiled"},
    ]
    for cases in groups:
        assert len({models_report.condition(vars(case)) for case in cases}) == 1
        for case in cases:
            check_subject(case.model)
            assert case.channels_last and case.device == "cuda" and "bfloat16" in case.precision


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--only", "model"], "--only takes one of: first tests attention models memory; not"),
        (["--only", "first tests"], "not 'first tests'"),
        (["--only"], "not ''"),
        (["--dryrun"], "unknown option --dryrun"),
    ],
)
def test_mistakes(flags, says):
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and says in done.stderr and not done.stdout
