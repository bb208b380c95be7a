"""Gets timm's test suite for the installed timm, and runs it on models of ours.

The suite is fetched when the tests run, by version of the timm that is installed: it is the
contract of that version, and timm's files stay out of this repository.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import timm

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".suite"
FETCH_TIMEOUT = 300  # seconds


class SuiteUnavailable(Exception):
    """The suite could not be had; the message says why."""


@dataclass(frozen=True)
class PeerRun:
    """One run of timm's suite.

    Attributes:
        report: what the plugin wrote (see ``timm_peer.pytest_sessionfinish``).
        output: what pytest printed.
        exit_status: pytest's.
    """

    report: dict[str, Any]
    output: str
    exit_status: int

    def outcomes(self, model: str) -> dict[str, list[dict[str, str]]]:
        """Results of one model, by outcome: passed, failed, skipped."""
        grouped: dict[str, list[dict[str, str]]] = {"passed": [], "failed": [], "skipped": []}
        for result in self.report["results"]:
            if result["model"] == model:
                grouped[result["outcome"]].append(result)
        return grouped


def fetch_suite(version: str = timm.__version__, cache: Path = CACHE) -> Path:
    """Returns the folder that holds ``tests/`` of a timm release, fetching it if need be.

    Raises:
        SuiteUnavailable: no package index within reach, or the archive has no such tests.
    """
    target = cache / version
    if (target / "tests" / "test_models.py").is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as folder:
        archive = _download(version, Path(folder))
        unpacked = Path(folder) / "suite"
        _unpack_tests(archive, unpacked)
        if not (unpacked / "tests" / "test_models.py").is_file():
            raise SuiteUnavailable(f"{archive.name} has no tests/test_models.py")
        try:
            # In one step: parallel test processes may fetch at the same time, the first one wins.
            unpacked.rename(target)
        except OSError:
            if not (target / "tests" / "test_models.py").is_file():
                raise
    return target


def run_suite(
    suite: Path,
    models: str,
    package: str = "vitlinear",
    timeout: float = 3600,
    in_turn: bool = False,
) -> PeerRun:
    """Runs timm's ``tests/test_models.py`` on some models, in a process of its own.

    Args:
        suite: from :func:`fetch_suite`.
        models: names or wildcards, comma separated.
        package: the package that registers them, importable or beside this file.
        timeout: seconds for the whole run; timm gives each test its own limit besides.
        in_turn: whether the models take turns with the tests of ``timm_peer.IN_TURN``.
    """
    with tempfile.TemporaryDirectory(prefix="timm-peer-") as folder:
        report = Path(folder) / "report.json"
        environment = {
            name: value
            for name, value in os.environ.items()
            # A GitHub runner gets fewer tests from timm, and pytest's own variables are ours.
            if name != "GITHUB_ACTIONS" and not name.startswith("PYTEST_")
        }
        environment.update(
            PYTHONPATH=os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
            VITLINEAR_PEER_PACKAGE=package,
            VITLINEAR_PEER_MODELS=models,
            VITLINEAR_PEER_IN_TURN="1" if in_turn else "",
            VITLINEAR_PEER_REPORT=str(report),
        )
        command = [sys.executable, "-m", "pytest", "-p", "timm_peer", "-p", "no:cacheprovider"]
        # The archive's own pyproject.toml has the markers, and keeps ours out of this run.
        command += ["-c", "pyproject.toml", "--rootdir", ".", "-rfE", "-v", "--tb=short"]
        command += ["tests/test_models.py"]
        finished = subprocess.run(
            command,
            cwd=suite,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if not report.is_file():
            raise RuntimeError(f"timm's suite did not run:\n{finished.stdout[-4000:]}")
        return PeerRun(json.loads(report.read_text()), finished.stdout, finished.returncode)


def _download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", f"timm=={version}", "--no-deps"]
    command += ["--no-binary", "timm", "--dest", str(folder), "--quiet", "--retries", "1"]
    command += ["--disable-pip-version-check", "--no-input"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise SuiteUnavailable(f"pip download took more than {FETCH_TIMEOUT} s") from error
    archives = sorted(folder.glob("timm-*.tar.gz"))
    if done.returncode or not archives:
        last = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise SuiteUnavailable(f"the source archive of timm {version} could not be fetched: {last}")
    return archives[0]


def _unpack_tests(archive: Path, target: Path) -> None:
    """Writes ``tests/`` and pyproject.toml, not timm itself: the installed one is under test."""
    with tarfile.open(archive) as files:
        for member in files.getmembers():
            inside = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            wanted = inside.parts[:1] == ("tests",) or str(inside) == "pyproject.toml"
            if not (member.isfile() and wanted) or ".." in inside.parts:
                continue
            content = files.extractfile(member)
            assert content is not None  # a regular file has content
            path = target / inside
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
