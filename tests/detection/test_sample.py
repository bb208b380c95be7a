"""Detectors learn the sample's photographs by heart, and a run that was killed goes on."""

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.dense.openmmlab import packages
from tests.dense.training import command, environment, metrics, run

pytestmark = packages()

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "detection"
RETINANET = CONFIGS / "retinanet_test-ravlt_fpn_sample.py"
MASK_RCNN = CONFIGS / "mask-rcnn_test-ravlt_fpn_sample.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run tools in, which holds data/sample."""
    pytest.importorskip("skimage")
    path = tmp_path_factory.mktemp("sample")
    run(path, "sample_dense_data.py")
    return path


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.nightly  # one minute and three; torchvision's detectors do the same in every run
@pytest.mark.parametrize(
    ("config", "least"),
    [
        (RETINANET, {"coco/bbox_mAP_50": 0.9}),
        (MASK_RCNN, {"coco/bbox_mAP_50": 0.9, "coco/segm_mAP_50": 0.8}),
    ],
    ids=["retinanet", "mask-rcnn"],
)
def test_photographs_are_learned_by_heart(
    folder: Path, config: Path, least: dict[str, float]
) -> None:
    work_dir = folder / config.stem
    run(folder, "train_detector.py", config, "--work-dir", work_dir)
    reached = metrics(work_dir)
    assert {name: reached[name] for name in least if reached[name] < least[name]} == {}
    # what was trained is what the other tools read
    checkpoint = Path((work_dir / "last_checkpoint").read_text())
    tested = folder / f"{config.stem}-test"
    run(folder, "test_detector.py", config, checkpoint, "--work-dir", tested)
    again = metrics_of_test(tested)
    assert {name: again[name] for name in least} == {name: reached[name] for name in least}
    images, results = folder / "data/sample/coco/images", folder / f"{config.stem}.json"
    flags = ("--out", folder / "drawn", "--results-file", results)
    task = ("--task", "detection", config, checkpoint)
    run(folder, "predict.py", *task, images / "coins_top.jpg", images / "astronaut.jpg", *flags)
    coins, astronaut = json.loads(results.read_text())
    found = [item for item in coins["detections"] if item["score"] > 0.5]
    assert {item["class"] for item in found} == {"coin"} and 11 <= len(found) <= 13
    assert {"person", "rocket"} <= {item["class"] for item in astronaut["detections"]}


def metrics_of_test(work_dir: Path) -> dict[str, float]:
    (path,) = work_dir.glob("*/*.json")
    return dict(json.loads(path.read_text()))


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.nightly  # a minute, most of it mmengine's own
def test_a_killed_run_goes_on(folder: Path) -> None:
    """Killed after its first checkpoint and started again, it ends with the same weights."""
    options = ("--cfg-options", "train_cfg.max_iters=9", "train_cfg.val_interval=9")
    options += ("default_hooks.checkpoint.interval=3",)
    run(folder, "train_detector.py", RETINANET, "--work-dir", folder / "whole", *options)
    work_dir = folder / "killed"
    arguments = command("train_detector.py", RETINANET, "--work-dir", work_dir, *options)
    process = subprocess.Popen(
        arguments,
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    last = work_dir / "last_checkpoint"
    while not last.exists() or not last.read_text().endswith("iter_3.pth"):
        assert process.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (work_dir / "iter_9.pth").exists(), "it was killed too late to show anything"
    said = run(folder, "train_detector.py", RETINANET, "--work-dir", work_dir, "--resume", *options)
    assert "resumed epoch: 0, iter: 3" in said
    whole, resumed = (
        torch.load(folder / name / "iter_9.pth", weights_only=False, map_location="cpu")
        for name in ("whole", "killed")
    )
    assert whole["meta"]["iter"] == resumed["meta"]["iter"] == 9
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key
