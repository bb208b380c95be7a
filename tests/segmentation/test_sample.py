"""Segmentors learn the sample's photographs by heart."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.dense.openmmlab import packages
from tests.dense.training import metrics, run

pytestmark = packages()

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "segmentation"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run tools in, which holds data/sample."""
    pytest.importorskip("skimage")
    path = tmp_path_factory.mktemp("sample")
    run(path, "sample_dense_data.py")
    return path


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.nightly  # a minute each; torchvision's detectors do the same in every run
@pytest.mark.parametrize("architecture", ["semantic-fpn", "upernet"])
def test_photographs_are_learned_by_heart(folder: Path, architecture: str) -> None:
    config = CONFIGS / f"{architecture}_test-ravlt_sample.py"
    work_dir = folder / architecture
    run(folder, "train_segmentor.py", config, "--work-dir", work_dir)
    assert metrics(work_dir)["mIoU"] >= 90
    checkpoint = Path((work_dir / "last_checkpoint").read_text())
    results, out = folder / f"{architecture}.json", folder / f"drawn-{architecture}"
    photo = folder / "data/sample/ade/images/training/coffee.jpg"
    arguments = ("--task", "segmentation", config, checkpoint, photo)
    run(folder, "predict.py", *arguments, "--out", out, "--results-file", results)
    (result,) = json.loads(results.read_text())
    assert {item["class"] for item in result["classes"]} >= {"background", "cup", "spoon"}
    with Image.open(folder / "data/sample/ade/annotations/training/coffee.png") as file:
        truth = np.array(file).astype(int) - 1
    with Image.open(result["label_map"]) as file:
        labels = np.array(file)
    assert np.mean((labels == truth)[truth >= 0]) > 0.95
