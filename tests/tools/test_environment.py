"""tools/_venv.py: when the environment is made, reused, extended, and what its errors say."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along

TOOL = Path(__file__).resolve().parents[2] / "tools" / "_venv.py"


def _run_tests() -> ModuleType:
    """tools/run_tests.py, which imports what stands beside it."""
    sys.path.insert(0, str(TOOL.parent))
    try:
        return importlib.import_module("run_tests")
    finally:
        sys.path.remove(str(TOOL.parent))


RUN_TESTS = _run_tests()


class Installs:
    """Stands in for making the environment and for pip; remembers what was asked of them."""

    def __init__(self) -> None:
        self.created = 0
        self.extras: list[list[str]] = []
        self.fails = False


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_venv_under_test", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("VITLINEAR_VENV", str(tmp_path / "venv"))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("a")
    (tmp_path / "constraints.txt").write_text("b")
    return module


@pytest.fixture
def installs(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Installs:
    seen = Installs()

    def create(folder: Path) -> None:
        seen.created += 1
        python = folder / tool.program("python").relative_to(tool.venv_dir())
        python.parent.mkdir(parents=True)
        python.touch()

    def pip_install(python: Path, extras: list[str], versions: str) -> None:
        seen.extras.append(extras)
        if seen.fails:
            raise tool.SetupError("pip failed")

    monkeypatch.setattr(tool, "_create", create)
    monkeypatch.setattr(tool, "_runs", lambda python: True)
    monkeypatch.setattr(tool, "_pip_install", pip_install)
    return seen


@pytest.mark.quick("tools")
def test_made_once_and_reused(tool: ModuleType, installs: Installs) -> None:
    assert tool.ensure(["dev", "train"]) == tool.program("python")
    tool.ensure(["train"])  # a part of what is there
    assert (installs.created, installs.extras) == (1, [["dev", "train"]])


def test_extended_and_never_narrowed(tool: ModuleType, installs: Installs) -> None:
    tool.ensure(["train"])
    tool.ensure(["dev"])
    assert (installs.created, installs.extras) == (1, [["train"], ["dev", "train"]])


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_installed_again_after_a_change(tool: ModuleType, installs: Installs, name: str) -> None:
    tool.ensure(["train"])
    (tool.ROOT / name).write_text("changed")
    tool.ensure(["train"])
    assert installs.extras == [["train"], ["train"]]


def test_failed_install_leaves_no_stamp(tool: ModuleType, installs: Installs) -> None:
    tool.ensure(["train"])
    installs.fails = True
    with pytest.raises(tool.SetupError):
        tool.ensure(["dev"])
    installs.fails = False
    tool.ensure(["train"])  # what was there may be half replaced
    assert len(installs.extras) == 3


def test_each_choice_of_versions_has_its_environment(tool: ModuleType, installs: Installs) -> None:
    for _ in range(2):
        for versions in (tool.PINNED, tool.NEWEST, tool.OLDEST):
            python = tool.ensure(["dev"], versions)
            assert python == tool.program("python", versions) and python.exists()
    assert installs.created == len(installs.extras) == 3
    assert sorted(path.name for path in tool.ROOT.glob("venv*")) == [
        "venv",
        "venv-newest",
        "venv-oldest",
    ]


def test_the_newest_versions_are_asked_for_each_day(tool: ModuleType, installs: Installs) -> None:
    for versions in (tool.PINNED, tool.NEWEST):
        tool.ensure(["dev"], versions)
        yesterday = time.time() - tool.DAY
        os.utime(tool.venv_dir(versions) / tool.STAMP_NAME, (yesterday, yesterday))
        tool.ensure(["dev"], versions)
    assert installs.created == 2 and len(installs.extras) == 3


@pytest.mark.quick("tools")
def test_the_oldest_versions_are_the_lower_bounds(tool: ModuleType) -> None:
    text = (TOOL.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    (tool.ROOT / "pyproject.toml").write_text(text, encoding="utf-8")
    for extras in ([], RUN_TESTS.EXTRAS):
        bounds = tool.oldest(extras).split()
        project = tomllib.loads(text)["project"]
        wanted = [*project["dependencies"]]
        for extra in [extra for extra in extras if extra != "dev"]:
            wanted += project["optional-dependencies"][extra]
        # Two want a Python that may not be this one.
        markers = {x: Requirement(x).marker for x in wanted}
        here = [x for x in wanted if (marker := markers[x]) is None or marker.evaluate()]
        assert bounds == [x.partition(";")[0].partition(",")[0].replace(">=", "==") for x in here]
    with pytest.raises(tool.SetupError, match="no list nothing"):
        tool.oldest(["nothing"])


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_damaged_stamp_means_install(tool: ModuleType, installs: Installs, content: str) -> None:
    tool.ensure(["train"])
    (tool.venv_dir() / tool.STAMP_NAME).write_text(content)
    tool.ensure(["train"])
    assert len(installs.extras) == 2
    assert json.loads((tool.venv_dir() / tool.STAMP_NAME).read_text())["extras"] == ["train"]


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("Failed to establish a new connection\nNo matching distribution found", "package index"),
        ("ERROR: No matching distribution found for torch==2.11.0", "pinned package"),
        ("RuntimeError: Error compiling objects for extension", "apt install g++ python3-dev"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "MAX_JOBS=1"),
        ("something else", "exit status 3"),
    ],
)
def test_errors_name_the_cause_in_one_line(tool: ModuleType, output: str, cause: str) -> None:
    message = tool._explain(output, 3, Path("install.log"))
    assert cause in message and "install.log" in message and "\n" not in message


def test_missing_ensurepip_names_the_remedy(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(tool.SetupError, match="apt install python3-venv"):
        tool.ensure(["train"])
    assert not tool.venv_dir().exists()


def test_compiled_extra_comes_last_without_isolation(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is compiled again where pip's cached wheel was for another torch."""
    asked: list[list[str]] = []
    loads = iter([False, True])
    monkeypatch.setattr(tool, "_pip", lambda python, log, arguments: asked.append(arguments))
    monkeypatch.setattr(tool, "_works", lambda python: next(loads))
    tool.venv_dir().mkdir()
    pins = ["-c", "constraints.txt"]
    tool._pip_install(Path("python"), ["dev", "openmmlab", "train"], tool.PINNED)
    plain, tools, compiled, again = asked
    assert plain == [*pins, "-e", ".[dev,train]"]
    assert {"ninja", "psutil", "setuptools", "wheel"} <= set(tools)
    assert compiled == [*pins, "--no-build-isolation", "-e", ".[dev,openmmlab,train]"]
    assert {"--no-build-isolation", "--no-cache-dir", "--force-reinstall"} <= set(again)

    monkeypatch.setattr(tool, "_works", lambda python: False)
    with pytest.raises(tool.SetupError, match="cannot be loaded"):
        tool._pip_install(Path("python"), ["openmmlab"], tool.PINNED)

    asked.clear()
    tool._pip_install(Path("python"), ["train"], tool.PINNED)
    assert asked == [[*pins, "-e", ".[train]"]]


@pytest.mark.process
def test_other_versions_do_without_what_cannot_be_compiled(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []
    python = tool.ROOT / "python"  # which is asked to uninstall: none that anybody uses
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)

    def pip(python: Path, log: Path, arguments: list[str]) -> None:
        asked.append(arguments)
        if "--no-build-isolation" in arguments:
            raise tool.SetupError("no compiler")

    monkeypatch.setattr(tool, "_pip", pip)
    (tool.ROOT / "pyproject.toml").write_text('dependencies = [\n  "a>=1.0,<2",\n]\n')
    bounds = tool.venv_dir(tool.OLDEST) / "oldest.txt"
    for versions, chosen in (
        (tool.NEWEST, ["--upgrade", "--upgrade-strategy", "eager"]),
        (tool.OLDEST, ["-c", str(bounds)]),
    ):
        tool.venv_dir(versions).mkdir()
        monkeypatch.setattr(tool, "COMPILED", "dependencies")  # the one list of this pyproject.toml
        tool._pip_install(python, ["dependencies"], versions)
        assert "its tests will skip: no compiler" in capsys.readouterr().out
        assert all(arguments[: len(chosen)] == chosen for arguments in asked)
        asked.clear()
    assert bounds.read_text() == "a==1.0\n" * 2
    with pytest.raises(tool.SetupError, match="no compiler"):
        tool.venv_dir().mkdir()
        tool._pip_install(python, ["dependencies"], tool.PINNED)


@pytest.mark.quick("tools")
@pytest.mark.parametrize(
    ("flags", "versions", "handed_on"),
    [
        (["--quick", "-x"], "pinned", ["--quick", "-x"]),
        (["--newest", "--nightly"], "newest", ["--nightly"]),
        (["tests/ops", "--oldest"], "oldest", ["tests/ops"]),
    ],
)
def test_flags_of_the_test_command(
    flags: list[str], versions: str, handed_on: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, ran = [], []
    venv = RUN_TESTS._venv
    monkeypatch.setattr(venv, "ensure", lambda extras, kind: made.append(kind) or kind)
    monkeypatch.setattr(venv, "run", lambda command: ran.append(command) or 3)
    monkeypatch.setattr(RUN_TESTS.os, "environ", dict(os.environ))
    monkeypatch.setattr(RUN_TESTS, "WORKERS", "0")
    assert RUN_TESTS.main(flags) == 3
    assert made == [versions] and ran == [[versions, "-m", "pytest", *handed_on]]
    with pytest.raises(venv.SetupError, match="choose one"):
        RUN_TESTS.main(["--newest", "--oldest"])
