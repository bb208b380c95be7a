"""Kernels that are compiled before there is a GPU are found again where they are unpacked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

TOOL = Path(__file__).resolve().parents[3] / "tools" / "gpu_cache.py"

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="pretends that there is a GPU"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's launchers are built for Linux"),
]


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the tool; its output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.process
def test_compiled_here_and_found_there(tmp_path):
    archive, calls = tmp_path / "cache.tar.xz", ("--only", "first", "--mechanisms", "l2", "elu")
    made = tool("make", archive, *calls)
    assert made.returncode == 0, made.stderr
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]
    with tarfile.open(archive) as tar:
        names = [Path(name).name for name in tar.getnames()]
    assert any(name.endswith(".cubin") for name in names)
    assert any(name.startswith("__triton_launcher") for name in names)
    unpacked = tool("unpack", archive, tmp_path / "there")
    assert unpacked.returncode == 0, unpacked.stderr
    about = json.loads((tmp_path / "there" / "about.json").read_text())
    assert about["target"] == "sm_90" and about["number"] > 5
    verified = tool("verify", tmp_path / "there", *calls)
    found, rest = verified.stdout.split(maxsplit=1)
    assert rest == "kernels found, 0 compiled\n"
    assert int(found) >= about["number"]  # what both call is found twice
    again = tool("compile", tmp_path / "there", *calls, "--mechanisms", "l2", "relu")
    found, _, _, compiled, _ = again.stdout.split()
    assert again.returncode == 0 and int(found) > 0 < int(compiled)


@pytest.mark.process
def test_an_archive_of_other_kernels(tmp_path):
    about = {"python": "3.1", "triton": "1.0", "kernels": "0", "target": "sm_90", "number": 1}
    (tmp_path / "about.json").write_text(json.dumps(about))
    with tarfile.open(tmp_path / "cache.tar.xz", "w:xz") as tar:
        tar.add(tmp_path / "about.json", "about.json")
    done = tool("unpack", tmp_path / "cache.tar.xz", tmp_path / "there")
    assert done.returncode == 1 and "will not find these kernels here: python 3." in done.stderr


@pytest.mark.process
def test_no_archive(tmp_path):
    done = tool("unpack", tmp_path / "cache.tar.xz", tmp_path / "there")
    assert done.returncode == 1 and done.stderr.startswith("error: cannot unpack ")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "there").exists()
