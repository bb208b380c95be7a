"""Label maps that do not fit their segmentor: refused before anything is trained or tested."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import Command
from tests.dense.openmmlab import packages, refusal, segmentor, stop_at_the_runner
from vitlinear.dense import ade

pytestmark = packages()
pytest.importorskip("skimage")

from vitlinear.dense.openmmlab import annotations  # noqa: E402

OPTION, TRAIN = "--cfg-options", "train_dataloader.dataset"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "ade"
    ade.write_sample(path)
    return path


@pytest.fixture
def config(sample: Path, tmp_path: Path) -> Path:
    """The config of a segmentor, with data that a test may change."""
    shutil.copytree(sample, tmp_path / "ade")
    return segmentor(tmp_path / "config.py", tmp_path / "ade")


def redraw(config: Path, paint: Callable[[np.ndarray], np.ndarray], most: int = 9) -> list[Path]:
    """Changes that many maps of each split."""
    changed = []
    for split in ("training", "validation"):
        for path in sorted((config.parent / "ade/annotations" / split).iterdir())[:most]:
            Image.fromarray(paint(np.array(Image.open(path)))).save(path)
            changed.append(path)
    return changed


def nine(labels: np.ndarray) -> np.ndarray:
    labels[0, 0] = 9
    return labels


@pytest.mark.parametrize(
    ("task", "paint", "most", "options", "says"),
    [
        ("train", lambda x: np.where(x > 1, 255, 0), 9, [], "only no class, with values 0, 255"),
        ("train", lambda x: np.where(x > 1, 255, 1), 9, [], "only class 'background', with values"),
        ("test", lambda x: np.where(x > 1, 255, 1), 9, [], "only class 'background', with values"),
        ("train", nine, 1, [], "has the value 9, which is no class"),
        ("test", nine, 1, [], "has the value 9, which is no class"),
        ("train", lambda x: np.stack([x] * 3, -1), 1, [], "has 3 channels"),
        ("train", lambda x: x[::2, ::2], 1, [], "they must be the same"),
        ("train", None, 0, ["model.decode_head.num_classes=150"], "num_classes is 150, and"),
        ("train", None, 0, [f"{TRAIN}.reduce_zero_label=False"], "say the same"),
        ("train", None, 0, [f"{TRAIN}.img_suffix=.tif"], "has no images: none in"),
        ("train", None, 0, [f"{TRAIN}.seg_map_suffix=.tif"], "has no label map"),
    ],
)
def test_what_cannot_be_meant(
    task: str,
    paint: Callable[[np.ndarray], np.ndarray] | None,
    most: int,
    options: list[str],
    says: str,
    config: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    changed = redraw(config, lambda x: paint(x).astype(np.uint8), most) if paint else []
    error = refusal(command, f"{task}-segmentor", config, options, tmp_path)
    assert says in error
    if most == 1:
        assert str(changed[task == "test"]) in error


def test_counts_are_told_and_a_long_count_is_remembered(
    config: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at_the_runner(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(annotations, "SLOW", -1)
    counted: list[int] = []
    real = annotations.count_labels
    monkeypatch.setattr(
        annotations, "count_labels", lambda *args: counted.append(len(args[0])) or real(*args)
    )
    words = ("train-segmentor", config, "--work-dir", tmp_path / "work")
    said = []
    for _ in range(2):
        result = command(*words)
        assert result.err == "error: stopped\n"
        said.append([line for line in result.out.splitlines() if " label maps: " in line])
    assert counted == [5, 2] and said[0] == said[1]
    assert said[0][0].startswith("train_dataloader.dataset: 5 label maps: background ")
    redraw(config, nine, 1)
    result = command(*words)
    assert "has the value 9" in result.err and counted == [5, 2, 5]
