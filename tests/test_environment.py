"""tools/_venv.py: when the environment is made, reused, extended, and what its errors say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "_venv.py"


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

    def create() -> None:
        seen.created += 1
        tool.program("python").parent.mkdir(parents=True)
        tool.program("python").touch()

    def pip_install(python: Path, extras: list[str]) -> None:
        seen.extras.append(extras)
        if seen.fails:
            raise tool.SetupError("pip failed")

    monkeypatch.setattr(tool, "_create", create)
    monkeypatch.setattr(tool, "_runs", lambda python: True)
    monkeypatch.setattr(tool, "_pip_install", pip_install)
    return seen


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
    tool._pip_install(Path("python"), ["dev", "openmmlab", "train"])
    plain, tools, compiled, again = asked
    assert plain == ["-e", ".[dev,train]"]
    assert {"ninja", "psutil", "setuptools", "wheel"} <= set(tools)
    assert compiled == ["--no-build-isolation", "-e", ".[dev,openmmlab,train]"]
    assert {"--no-build-isolation", "--no-cache-dir", "--force-reinstall"} <= set(again)

    monkeypatch.setattr(tool, "_works", lambda python: False)
    with pytest.raises(tool.SetupError, match="cannot be loaded"):
        tool._pip_install(Path("python"), ["openmmlab"])

    asked.clear()
    tool._pip_install(Path("python"), ["train"])
    assert asked == [["-e", ".[train]"]]
