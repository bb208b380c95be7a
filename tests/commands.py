"""Fixtures that tests of several rooms share: the command in this process, images, a checkpoint.

They import what they need when they run: tools/gpu_check.sh loads this file where half of the
packages are missing.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest


class Result(NamedTuple):
    """The outcome of a command: its exit status and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``vitlinear`` with the given arguments."""

    from vitlinear_cli import main

    def run(*args: object) -> Result:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        return Result(code, *capsys.readouterr())

    return run


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one process of a run makes and the others read: those of pytest-xdist wait."""
    import fcntl

    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, done = base / name, base / f"{name}.done"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


STAGES = """
import json, sys, timm, torch
stages = [set(sys.modules)]
import vitlinear
stages.append(set(sys.modules))
from vitlinear import ops
x = torch.randn(1, 4, 1, 8, requires_grad=True)
for backend in ("auto", "library"):
    ops.linear_attention(x, x, x, backend=backend).sum().backward()
stages.append(set(sys.modules))
import vitlinear.detection, vitlinear.segmentation
import vitlinear.dense.backbone, vitlinear.dense.padding, vitlinear.detection.torchvision
stages.append(set(sys.modules))
print(json.dumps([sorted(stage) for stage in stages]))
"""


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The names of all modules that a process has loaded, after each of its steps.

    After ``import timm``, then ``import vitlinear``, then attentions, then the rooms of detectors
    and segmentors.
    """

    def load(folder: Path) -> None:
        with open(folder / "stages.json", "w") as output:
            subprocess.run([sys.executable, "-c", STAGES], stdout=output, check=True)

    names = json.loads((made_once(tmp_path_factory, "modules", load) / "stages.json").read_text())
    steps = ("timm", "vitlinear", "attention", "dense")
    return dict(zip(steps, map(set, names), strict=True))


@pytest.fixture(scope="session")
def fork_server() -> None:
    """The server that children of tests fork from: it runs, with all that any of them imports."""
    from multiprocessing import forkserver

    import tests.train.helpers  # noqa: F401  says what it imports

    forkserver.ensure_running()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder data set like `images`, which some files have of their own; tests only read it."""
    from tests.train.helpers import image_folder

    return image_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder data set of three classes; tests only read it."""
    from tests.train.helpers import image_folder

    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def checkpoint(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that tells the three classes apart."""
    from tests.train.helpers import train

    flags = ["--epochs", 16, "--lr", 1e-2, "--color-jitter", 0, "--scale", 0.8, 1.0]
    folder = made_once(
        tmp_path_factory, "trained", lambda folder: train(images, folder / "run", *flags)
    )
    return folder / "run" / "best.safetensors"
