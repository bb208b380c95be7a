"""What an installed vitlinear brings, needs and leaves alone."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vitlinear

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {"triton", "train", "data", "openmmlab", "export", "analysis", "dev"}
# Heavy or optional: a user who only wants a backbone must not load them.
LAZY = ("triton", "mmengine", "mmcv", "mmdet", "mmseg", "matplotlib", "sklearn", "onnx", "fvcore")


def pins() -> dict[str, list[Requirement]]:
    """constraints.txt by normalised name; two pins where Python 3.10 needs its own."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def test_version_agrees_with_the_metadata() -> None:
    assert importlib.metadata.version("vitlinear") == vitlinear.__version__


def test_changelog_has_the_version() -> None:
    assert f"## [{vitlinear.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_extras_are_declared() -> None:
    assert set(importlib.metadata.metadata("vitlinear").get_all("Provides-Extra") or ()) == EXTRAS


@pytest.mark.parametrize("extra", [None, *sorted(EXTRAS)])
def test_pins_satisfy_what_is_declared(extra: str | None) -> None:
    """Every requirement has a pin, on each supported Python, inside the range users are given."""
    pinned, checked = pins(), 0
    for text in importlib.metadata.requires("vitlinear") or ():
        requirement = Requirement(text)
        if extra is None and requirement.marker is not None:
            continue
        if extra is not None and not (
            requirement.marker and f'extra == "{extra}"' in str(requirement.marker)
        ):
            continue
        checked += 1
        candidates = pinned[canonicalize_name(requirement.name)]
        for python in ("3.10", "3.11", "3.13"):
            chosen = [
                pin
                for pin in candidates
                if pin.marker is None or pin.marker.evaluate({"python_version": python})
            ]
            assert len(chosen) == 1, f"{requirement.name} on Python {python}: {chosen}"
            version = str(chosen[0].specifier).removeprefix("==")
            assert requirement.specifier.contains(version, prereleases=True), requirement
    assert checked


def test_pre_commit_uses_the_pinned_ruff() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    used = {
        dependency
        for repository in hooks
        for hook in repository["hooks"]
        for dependency in hook.get("additional_dependencies", ())
        if dependency.startswith("ruff==")
    }
    assert used == {str(pin) for pin in pins()["ruff"]}


def test_console_script_is_importable() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="vitlinear")
    assert [script.value for script in scripts] == ["vitlinear_cli:main"]
    assert all(callable(script.load()) for script in scripts)


@pytest.mark.process
def test_import_loads_nothing_optional() -> None:
    """Beyond what ``import timm`` loads: another release of torch may itself load one of these."""
    code = (
        "import sys, json, timm; before = set(sys.modules); import vitlinear; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & set(LAZY)
    assert "vitlinear" in loaded


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    """Built from the files git would commit, so that what lies about does not hide a mistake."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    source = tmp_path / "source"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--quiet", "--disable-pip-version-check", "--wheel-dir", str(tmp_path), "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("vitlinear-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"vitlinear", f"vitlinear-{vitlinear.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    inside = {
        str(path.relative_to(source))
        for path in (source / "vitlinear").rglob("*")
        if path.suffix in {".py", ".json", ".yaml", ".typed"}
    }
    assert inside <= names
    assert "vitlinear/py.typed" in inside


def test_nothing_refers_to_files_outside_the_repository() -> None:
    """A clone must be complete: no path that climbs out of it, in any text file."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    climbing = re.compile(r"\.\./shared|/work/(main|shared)")
    here = Path(__file__).relative_to(ROOT).as_posix()
    offenders = [
        name
        for name in listed.stdout.split("\0")
        if name
        and name != here
        and (ROOT / name).is_file()
        and Path(name).suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json", ""}
        and climbing.search((ROOT / name).read_text(errors="replace"))
    ]
    assert not offenders
