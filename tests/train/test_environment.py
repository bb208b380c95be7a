"""Records of a run's surroundings: each start, no secrets, differences from the commit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitlinear
from vitlinear.errors import UserError
from vitlinear.train.record import environment
from vitlinear.train.record.environment import read_starts, record_start, repositories, variables
from vitlinear.train.record.folder import PATCHES

CPU = torch.device("cpu")
IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@b.c")


def git(place: Path, *arguments: str) -> str:
    command = ["git", "-C", str(place), *IDENTITY, *arguments]
    environ = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environ
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a repository with one commit, which ignores ``runs``."""
    root = tmp_path / "work"
    root.mkdir()
    git(root, "init", "-q", "-b", "trunk")
    (root / "code.py").write_text("print(1)\n")
    (root / ".gitignore").write_text("runs\n")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    (root / "runs").mkdir()
    monkeypatch.chdir(root)
    return root


def test_a_start_says_what_ran_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/vitlinear", "train", "--experiment", "two words"])
    monkeypatch.setenv("VITLINEAR_BACKEND", "eager")
    record_start(tmp_path, CPU)
    (start,) = read_starts(tmp_path / "environment.json")
    assert start["command"].endswith("/bin/vitlinear train --experiment 'two words'")
    assert start["command"].startswith(sys.executable) and start["update"] == 0
    assert start["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert start["packages"]["vitlinear"] == vitlinear.__version__ and start["packages"]["timm"]
    assert start["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (start["device"], start["gpus"]) == ("cpu", [])
    assert start["cores"]["machine"] == os.cpu_count() and start["cpu"] and start["hostname"]
    assert start["working_folder"] == os.getcwd()
    assert start["variables"]["VITLINEAR_BACKEND"] == "eager"
    assert start["time"][:2] == "20" and start["os"]


def test_each_start_is_kept(tmp_path: Path) -> None:
    for update in (0, 120, 120):
        record_start(tmp_path, CPU, update, command=["train"])
    starts = read_starts(tmp_path / "environment.json")
    assert [(start["update"], start["command"]) for start in starts] == [
        (0, "train"), (120, "train"), (120, "train")
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["{", "[]", '{"starts": 3}', "\0"])
def test_a_damaged_record_is_not_replaced(tmp_path: Path, text: str) -> None:
    path = tmp_path / "environment.json"
    path.write_text(text)
    with pytest.raises(UserError, match="environment.json is damaged .*move it away"):
        record_start(tmp_path, CPU, 7)
    assert path.read_text() == text


def test_secrets_stay_private() -> None:
    environ = {
        "OMP_NUM_THREADS": "1", "NCCL_DEBUG": "INFO", "VITLINEAR_BACKEND": "eager",
        "SLURM_JOB_ID": "12", "SLURM_JWT": "s", "WANDB_API_KEY": "s", "HF_TOKEN": "s",
        "VITLINEAR_HUB_TOKEN": "s", "TORCH_SECRET": "s", "AWS_PROFILE": "s", "HOME": "s",
    }  # fmt: skip
    kept = ["NCCL_DEBUG", "OMP_NUM_THREADS", "SLURM_JOB_ID", "VITLINEAR_BACKEND"]
    assert list(variables(environ)) == kept


def of_working_folder(folder: Path) -> dict:
    (found,) = (state for state in repositories(folder) if "working folder" in state["of"])
    return found


def test_a_clean_repository(repository: Path) -> None:
    state = of_working_folder(repository / "runs")
    assert state == {
        "root": str(repository.resolve()), "of": ["working folder"], "branch": "trunk",
        "commit": git(repository, "rev-parse", "HEAD"), "dirty": False, "untracked": [],
    }  # fmt: skip


def test_the_patch_gives_back_what_ran(repository: Path, tmp_path: Path) -> None:
    """Staged, unstaged and binary changes; applied to the commit it is what was there."""
    runs = repository / "runs"
    changed = {
        "code.py": b"print(2)\n",
        "staged.py": "umlaut = 'ü'\n".encode(),
        "image": b"\0\1\xff",
    }
    for name, content in changed.items():
        (repository / name).write_bytes(content)
    git(repository, "add", "staged.py", "image")
    (repository / "notes").mkdir()
    (repository / "notes" / "a.txt").write_text("a")
    state = of_working_folder(runs)
    assert state["dirty"] and state["untracked"] == ["notes/"]
    patch = runs / state["patch"]
    assert patch.name.startswith("git") and patch.match(PATCHES)
    git(tmp_path, "clone", "-q", str(repository), "copy")
    git(tmp_path / "copy", "apply", str(patch))
    for name, content in changed.items():
        assert (tmp_path / "copy" / name).read_bytes() == content

    assert of_working_folder(runs)["patch"] == patch.name  # the same changes: the same file
    (repository / "code.py").write_text("print(3)\n")
    second = of_working_folder(runs)["patch"]
    assert second != patch.name and b"print(3)" in (runs / second).read_bytes()
    assert b"print(2)" in patch.read_bytes()


def test_a_repository_without_commit_a_detached_one_and_none(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(repository, "checkout", "-q", "--detach")
    assert of_working_folder(tmp_path)["branch"] is None
    (tmp_path / "new").mkdir()
    git(tmp_path / "new", "init", "-q", "-b", "trunk")
    monkeypatch.chdir(tmp_path / "new")
    state = of_working_folder(tmp_path)
    assert (state["commit"], state["branch"], state["dirty"]) == (None, "trunk", None)
    monkeypatch.chdir(tmp_path)
    assert not any("working folder" in state["of"] for state in repositories(tmp_path))


def test_a_huge_difference_and_a_long_list_are_left_out(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "LARGEST_PATCH", 1000)
    monkeypatch.setattr(environment, "LONGEST_LIST", 3)
    (repository / "code.py").write_bytes(b"x = 1\n" * 1000)
    for index in range(5):
        (repository / f"{index}.txt").touch()
    state = of_working_folder(repository / "runs")
    assert state["dirty"] and "patch" not in state
    assert state["untracked"] == ["0.txt", "1.txt", "2.txt", "... and 2 more"]


def test_an_installed_package_is_not_the_repository_around_it(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = repository / "runs" / "venv" / "vitlinear"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(vitlinear, "__file__", str(package / "__init__.py"))
    assert of_working_folder(repository / "runs")["of"] == ["working folder"]
    git(repository, "add", "-f", str(package))
    assert of_working_folder(repository / "runs")["of"] == ["vitlinear", "working folder"]


def test_without_git(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    record_start(repository / "runs", CPU)
    (start,) = json.loads((repository / "runs" / "environment.json").read_text())["starts"]
    assert start["git"] == []
