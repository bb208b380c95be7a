"""The scripts of the GPU check, without a GPU; those of kernels run in interpreted/ too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
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


# Notes its arguments, and writes the file that they name. Two steps hang until they are
# interrupted, one of them among those that run side by side, and two fail.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$RECORD"
for argument; do
    case $previous in --output | --junit-xml) output=$argument ;; esac
    previous=$argument
done
case "$*" in
"-c "*) echo mala elu ;;
*first_contact* | *"[elu]"*)
    trap 'echo interrupted >"$output"; exit 130' INT
    sleep 60
    ;;
*/gpu.py* | *"-k cuda_graph"*) exit 1 ;;
esac
if [[ -n $output ]]; then echo ended >"$output"; fi
"""
# Called as timeout -s INT -k 10 SECONDS COMMAND...; the time is up at once.
TIMEOUT = """#!/usr/bin/env bash
exec {timeout} "${{@:1:4}}" 6 "${{@:6}}"
"""


def test_steps_of_the_check(tmp_path):
    """In their order; each is interrupted when its time is up, and none stops the rest."""
    programs, record, folder = tmp_path / "bin", tmp_path / "record", tmp_path / "results"
    programs.mkdir()
    for name, text in (
        ("python", PYTHON),
        ("timeout", TIMEOUT.format(timeout=shutil.which("timeout"))),
        ("compute-sanitizer", PYTHON),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHON": str(programs / "python"),
        "RECORD": str(record),
        "GPU_CACHE": str(tmp_path / "none"),
    }
    environment.pop("GPU_CHECK_SECONDS", None)
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stderr, done.stderr
    assert done.stdout.splitlines()[-1].endswith("exit status 1")
    steps = (
        ("gpu_cache.py compile", "first_contact.py")
        + ("-k cuda_graph", "-k more_than_8_gib", "-k bit_equal", "-c from vitlinear")
        + ("test_run.py", "-k compile_fullgraph", "[elu]", "[mala]")  # side by side, in any order
        + ("-k workspace or", "-k measured_configurations", "/gpu.py", "gpu_models.py")
        + ("--tool memcheck", "--tool racecheck")
    )
    lines = record.read_text().splitlines()
    assert len(lines) == len(steps)
    places = [next(i for i, step in enumerate(steps) if step in line) for line in lines]
    assert places == [*range(6), *places[6:10], *range(10, 16)]
    assert sorted(places) == [*range(16)]
    with tarfile.open(folder / "report.tar.gz") as packed:
        names = {Path(name).name for name in packed.getnames()}
        reports = {
            name: packed.extractfile(f"./tests_{name}.xml").read() for name in ("elu", "mala")
        }
    assert {"first.txt", "tests_cuda_graph.txt", "tests_alone.xml", "gpu.txt"} <= names
    assert reports == {"elu": b"interrupted\n", "mala": b"ended\n"}
    assert "tests_elu.xml" in lines[12] and "tests_alone.xml" in lines[12]  # gpu.py counts them
    assert (folder / "first.jsonl").read_text() == "interrupted\n"
    assert not (folder / "gpu.json").exists()
    assert (folder / "models.json").read_text() == "ended\n"
