"""Annotations that do not fit their detector: refused before anything is trained or tested."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Command
from tests.dense.openmmlab import detector, packages, refusal, stop_at_the_runner
from vitlinear.dense import coco

pytestmark = packages()
pytest.importorskip("skimage")

from vitlinear.dense.openmmlab import annotations  # noqa: E402

NAMES = ("person", "cat", "cup", "spoon", "coin", "rocket")
OPTION = "--cfg-options"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "coco"
    coco.write_sample(path)
    return path


@pytest.fixture
def config(sample: Path, tmp_path: Path) -> Path:
    """The config of a detector, with data that a test may change."""
    shutil.copytree(sample, tmp_path / "coco")
    return detector(tmp_path / "config.py", tmp_path / "coco")


def change(config: Path, edit: Callable[[dict[str, Any]], object], split: str = "train") -> Path:
    path = config.parent / "coco/annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def rename(config: Path, *names: str) -> None:
    text = config.read_text()
    before = f"classes = {NAMES!r}".replace("'", '"')
    config.write_text(text.replace(before, f"classes = {names!r}"))
    assert config.read_text() != text


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends the commands behind the check."""
    stop_at_the_runner(monkeypatch)


def narrow(content: dict[str, Any]) -> None:
    for annotation in content["annotations"]:
        annotation["bbox"][2] = 0


def empty(content: dict[str, Any]) -> None:
    content["annotations"].clear()


@pytest.mark.parametrize(
    ("task", "prepare", "options", "says"),
    [
        ("train", lambda config: rename(config, *reversed(NAMES)), [], "in another order than"),
        ("test", lambda config: rename(config, *reversed(NAMES)), [], "in another order than"),
        ("train", lambda config: rename(config, "Person", *NAMES[1:]), [], "did you mean person"),
        ("train", lambda config: rename(config, *"abcdef"), [], "its categories are person, cat"),
        ("train", lambda config: change(config, narrow), [], "no box of any class"),
        ("test", lambda config: change(config, empty, "val"), [], "no box of any class"),
        ("train", lambda config: None, ["model.bbox_head.num_classes=80"], "num_classes is 80"),
        ("test", lambda config: None, ["model.bbox_head.num_classes=3"], "num_classes is 3, and"),
    ],
)
def test_what_cannot_be_meant(
    task: str,
    prepare: Callable[[Path], object],
    options: list[str],
    says: str,
    config: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    prepare(config)
    assert says in refusal(command, f"{task}-detector", config, options, tmp_path)


def test_the_file_that_scores_is_compared_too(
    config: Path, tmp_path: Path, command: Command
) -> None:
    """It may be another one than that of the data set."""
    other = tmp_path / "other.json"
    other.write_text((tmp_path / "coco/annotations/instances_val.json").read_text())
    content = json.loads(other.read_text())
    content["categories"].reverse()
    other.write_text(json.dumps(content))
    options = [OPTION, f"val_evaluator.ann_file={other}"]
    result = command("train-detector", config, "--work-dir", tmp_path / "work", *options)
    assert result.code == 2 and f"in another order than {other}" in result.err


def test_masks_are_learned_from_outlines(config: Path, tmp_path: Path, command: Command) -> None:
    config.write_text(
        config.read_text().replace("with_bbox=True", "with_bbox=True, with_mask=True")
    )
    path = change(config, lambda c: [item.pop("segmentation") for item in c["annotations"]])
    result = command("train-detector", config, "--work-dir", tmp_path / "work")
    assert result.code == 2 and f"{path} has no outlines" in result.err


@pytest.mark.usefixtures("stopped")
def test_counts_are_told(config: Path, tmp_path: Path, command: Command) -> None:
    """And a subset of the names, in the file's order, is what mmdet can be asked for."""
    rename(config, "cat", "coin")
    text = config.read_text()
    config.write_text(text + "model['bbox_head']['num_classes'] = 2\n")
    result = command("train-detector", config, "--work-dir", tmp_path / "work")
    assert result.err == "error: stopped\n"
    (line,) = [line for line in result.out.splitlines() if "instances_train.json: 5 images" in line]
    assert "cat 1, coin 12; left out: 5 of categories that" in line and "person" in line


@pytest.mark.usefixtures("stopped")
def test_a_long_count_is_remembered(
    config: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the file is the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(annotations, "SLOW", -1)
    counted: list[Path] = []
    real = annotations.count_instances
    monkeypatch.setattr(annotations, "count_instances", lambda p: counted.append(p) or real(p))
    words = ("train-detector", config, "--work-dir", tmp_path / "work")
    lines = [[line for line in command(*words).out.splitlines() if " boxes: " in line]]
    assert len(counted) == 2  # of training and of validation
    lines.append([line for line in command(*words).out.splitlines() if " boxes: " in line])
    assert len(counted) == 2 and lines[0] == lines[1] != []
    change(config, lambda content: content["annotations"].pop())
    assert [line for line in command(*words).out.splitlines() if " boxes: " in line] != lines[0]
    assert len(counted) == 3
