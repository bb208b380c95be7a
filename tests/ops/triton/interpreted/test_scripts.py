"""The scripts of the GPU check that measure kernels, in a dry run."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import first_contact, gpu
from vitlinear import ops


def test_attention(tmp_path, monkeypatch):
    output = tmp_path / "rows.json"
    flags = ["--dry-run", "--output", str(output), "--only", "triton"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    gpu.main()
    record = json.loads(output.read_text())
    assert record["dry_run"]
    assert len(record["rows"]) == 3 and all("forward_share" in row for row in record["rows"])


@pytest.mark.slow
def test_first_contact(tmp_path, monkeypatch):
    """A line for the machine, for each check, and for a shape, whatever ends the script."""
    output = tmp_path / "first.jsonl"
    checks = [*first_contact.checks("cpu", True)]
    assert [check.kind.mechanism for check in checks] == list(ops.MECHANISMS)
    # The other files here compare all of them.
    monkeypatch.setattr(first_contact, "checks", lambda device, dry: iter(checks[:2]))
    monkeypatch.setattr(sys, "argv", ["first_contact.py", "--dry-run", "--output", str(output)])
    with pytest.raises(SystemExit) as end:
        first_contact.main()
    assert end.value.code == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    checked = [line for line in lines if "check" in line]
    assert [line["check"] for line in checked] == list(ops.MECHANISMS)[:2]
    assert all(line["right"] or line["skipped"] for line in checked) and "torch" in lines[0]
    assert lines[-1]["finished"] and [line["shape"] for line in lines if "shape" in line]
