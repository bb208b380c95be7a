"""The things that an installed vitlinear brings, needs and leaves alone."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
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
from tests.commands import made_once
from vitlinear.checkpoints.read import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {
    *("triton", "train", "data", "openmmlab", "export", "openvino", "wsi", "geo", "analysis"),
    "dev",
}
# Heavy or optional: a user who only wants a backbone must not load them.
LAZY = (
    *("triton", "mmengine", "mmcv", "mmdet", "mmseg", "matplotlib", "sklearn", "onnx", "fvcore"),
    *("zarr", "tifffile", "rasterio", "openvino"),
)


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
def test_import_loads_nothing_optional(modules: dict[str, set[str]]) -> None:
    """Beyond what ``import timm`` loads: another release of torch may itself load one of these."""
    loaded = {name.split(".")[0] for name in modules["vitlinear"] - modules["timm"]}
    assert not loaded & set(LAZY)
    assert "vitlinear" in loaded


@pytest.mark.process
def test_help_and_version_load_no_torch() -> None:
    """They answer at once: everything else imports torch and timm, which takes seconds."""
    code = (
        "import sys, vitlinear_cli\n"
        "assert vitlinear_cli.main(['--help']) == vitlinear_cli.main(['--version']) == 0\n"
        "loaded = {'torch', 'timm', 'numpy', 'vitlinear'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"vitlinear {vitlinear.__version__}" in done.stdout


def tracked() -> list[str]:
    """The files that git would commit; a test that needs them skips outside of a checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files git would commit, so that what lies about does not hide a mistake."""
    names = tracked()

    def build(folder: Path) -> None:
        source = folder / "source"
        for name in names:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_symlink():
                (source / name).symlink_to(os.readlink(ROOT / name))
            else:
                (source / name).write_bytes((ROOT / name).read_bytes())
        pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(source))

    (path,) = made_once(tmp_path_factory, "wheel", build).glob("vitlinear-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs."""

    def install(folder: Path) -> None:
        pip("install", "--no-compile", "--no-index", "--target", str(folder), str(wheel))

    return made_once(tmp_path_factory, "installed", install)


def pip(command: str, *arguments: str) -> None:
    options = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, *options, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def run(installed: Path, folder: Path, *command: str) -> str:
    """Runs Python on the installed package alone, outside the tree; returns what it prints."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.process
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {
        "vitlinear",
        "vitlinear_cli.py",
        f"vitlinear-{vitlinear.__version__}.dist-info",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    written = [name for name in tracked() if not (ROOT / name).is_symlink()]
    inside = {name for name in written if name.startswith("vitlinear/")}
    data = {
        f"vitlinear/.mim/{name}"
        for name in written
        if name.split("/")[0] in ("configs", "model_cards")
    }
    assert {"vitlinear/py.typed", "vitlinear/.mim/model-index.yml"} < inside
    assert {
        "vitlinear/.mim/configs/classification/_base/pyramid.yaml",
        "vitlinear/.mim/model_cards/rala.md",
    } < data
    assert {name for name in names if name.startswith("vitlinear/")} == inside | data


COMMANDS = """
import json, sys, vitlinear_cli
for command in json.loads(sys.argv[1]):
    assert vitlinear_cli.main(command) == 0
    print(end="\\0")
"""


@pytest.mark.process
@pytest.mark.slow
def test_an_installed_wheel_finds_recipes_by_name(installed: Path, tmp_path: Path) -> None:
    """Lists them all, reads one over its base, and trains one to its end."""
    if importlib.util.find_spec("sklearn") is None:
        pytest.skip("the digits come with scikit-learn, which is not installed")
    commands = [
        ["configs", "--json"],
        ["train", "--config", "ravlt_t", "--print-config"],
        ["train", "--config", "digits_test_ravlt", "--epochs", "1", "--batch-size", "719"],
    ]
    commands[-1] += ["--no-plot", "--output", "run"]
    commands[-1] += ["--img-size", "16", "--model-kwargs", "depths=(1,0,0,0)"]  # a smaller model
    listed, values, *_ = run(installed, tmp_path, "-c", COMMANDS, json.dumps(commands)).split("\0")
    configs = json.loads(listed)
    assert all(Path(config["path"]).is_relative_to(installed) for config in configs)
    assert {(config["task"], Path(config["path"]).name) for config in configs} == {
        (path.parent.name, path.name)
        for pattern in ("classification/*.yaml", "detection/*.py", "segmentation/*.py")
        for path in (ROOT / "configs").glob(pattern)
    }
    recipe = yaml.safe_load(values)
    assert (recipe["model"], recipe["drop_path"]) == ("ravlt_t", 0.1)
    assert recipe["recipe_batch_size"] == 1024  # from the base
    assert read_checkpoint(str(tmp_path / "run" / "best.safetensors"))


MMENGINE = """
import sys, vitlinear.registry
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope

def parts(config):
    model = MODELS.build(config.model)
    pipeline = config.train_dataloader.dataset.pipeline
    return [type(part) for part in [*model.modules(), *map(TRANSFORMS.build, pipeline)]]

for scope, name in (
    ("mmdet", "detection/mask-rcnn_test-ravlt_fpn_sample.py"),
    ("mmseg", "segmentation/upernet_test-ravlt_sample.py"),
):
    init_default_scope(scope)
    config = get_config(f"vitlinear::{name}")
    assert config.filename.startswith(sys.argv[1]), config.filename
    with open("child.py", "w") as file:
        file.write(f"_base_ = 'vitlinear::{name}'; model = dict(backbone=dict(frozen_stages=1))")
    child = Config.fromfile("child.py")
    assert child.model.backbone.frozen_stages == 1
    assert parts(child) == parts(config)
"""


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.openmmlab
def test_mmengine_finds_what_a_wheel_installs(installed: Path, tmp_path: Path) -> None:
    """``vitlinear::...`` as a config and as a base, whose parts are mmdet's, mmseg's and ours."""
    for package in ("mmengine", "mmcv", "mmdet", "mmseg"):
        if importlib.util.find_spec(package) is None and not os.environ.get("CI"):
            pytest.skip(f"{package} is not installed (python3 tools/run_tests.py installs it)")
    run(installed, tmp_path, "-c", MMENGINE, str(installed))


def test_nothing_refers_to_a_development_machine() -> None:
    """Neither a path that climbs out of the repository nor one of a home, work or scratch folder.

    Folders that a reader is told to put in the place of their own, such as /data, are no such path.
    """
    machine = re.compile(
        rb"\.\./shared|(?<![\w.])/(?:work|workspace|root|scratch)\b|(?<![\w.])/(?:home|Users|tmp)/\w"
    )
    for path in (b"see ../shared/x", b'"/root"', b"(/work/x", b" /home/me/x", b"=/tmp/x.json"):
        assert machine.search(path)
    for other in (b"tests/work", b"https://example.org/home/", b"the /data/imagenet folder"):
        assert not machine.search(other)
    here = Path(__file__).relative_to(ROOT).as_posix()
    offenders = {
        name: found[0].decode()
        for name in tracked()
        if name != here
        and not (ROOT / name).is_symlink()
        and (found := machine.search((ROOT / name).read_bytes()))
    }
    assert not offenders


def test_documented_imports_work() -> None:
    """Every import of ours that a page shows; the pages of OpenMMLab's packages need them."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    line = re.compile(
        r"^ *((?:from vitlinear\S* )?import (?:\w+, )*[\w.]+(?:, \w+)*)", re.MULTILINE
    )
    shown = {
        found
        for page in pages
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        for found in line.findall(block)
        if "vitlinear" in found
    }
    assert "from vitlinear import ops" in shown
    for statement in shown:
        exec(statement, {})
