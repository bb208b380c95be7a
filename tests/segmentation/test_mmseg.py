"""A Semantic FPN of mmseg on a backbone of ours: losses, predictions, and the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.dense.openmmlab import build, packages, segmentor
from vitlinear.dense import ade
from vitlinear_cli import main

pytestmark = packages()
pytest.importorskip("skimage")


@pytest.fixture(autouse=True)
def no_visualizer_of_before() -> None:
    """mmengine keeps one of a name for the whole process, with the folder of the first run."""
    from mmseg.visualization import SegLocalVisualizer

    SegLocalVisualizer._instance_dict.clear()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmentation")
    ade.write_sample(folder / "ade")
    return segmentor(folder / "semantic_fpn.py", folder / "ade")


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two updates."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train-segmentor", str(config), "--work-dir", str(folder)]) == 0
    return folder / "iter_2.pth"


def test_losses_and_predictions_know_the_valid_sizes(config: Path) -> None:
    from mmengine.config import Config
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    model = build(Config.fromfile(config).model, "mmseg").train()
    seen: list[Any] = []
    model.backbone.register_forward_pre_hook(
        lambda module, args: seen.append(getattr(args[0], "valid_sizes", None))
    )

    def batch(*shapes: tuple[int, int]) -> dict[str, Any]:
        samples = []
        for shape in shapes:
            labels = PixelData(data=torch.randint(0, 7, (1, *shape)))
            meta = {"img_shape": shape, "ori_shape": shape}
            samples.append(SegDataSample(gt_sem_seg=labels, metainfo=meta))
        images = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for shape in shapes]
        return {"inputs": images, "data_samples": samples}

    data = model.data_preprocessor(batch((96, 128), (64, 80)), training=True)
    loss, _ = model.parse_losses(model(**data, mode="loss"))
    loss.backward()
    assert loss.isfinite() and loss > 0
    unused = [name for name, p in model.backbone.named_parameters() if p.grad is None]
    assert not unused

    model.eval()
    (prediction,) = model.test_step(batch((64, 80)))
    assert prediction.pred_sem_seg.shape == (64, 80)
    model.data_preprocessor.test_cfg = {"size_divisor": 32}
    (prediction,) = model.test_step(batch((64, 80)))
    assert prediction.pred_sem_seg.shape == (64, 80)
    assert seen == [((96, 128), (64, 80)), ((64, 80),), ((64, 80),)]


def test_resume_goes_on(config: Path, trained: Path, tmp_path: Path, capsys: Any) -> None:
    flags = ["--resume", str(trained), "--work-dir", str(tmp_path)]
    flags += ["--cfg-options", "train_cfg.max_iters=4"]
    assert main(["train-segmentor", str(config), *flags]) == 0
    log = capsys.readouterr()
    log = log.out + log.err
    assert "Iter(train) [3/4]" in log and "Iter(train) [1/4]" not in log
    assert (tmp_path / "iter_4.pth").exists() and not (tmp_path / "iter_2.pth").exists()


@pytest.mark.parametrize("tta", [[], ["--tta"]])
def test_evaluation(config: Path, trained: Path, tmp_path: Path, tta: list[str]) -> None:
    flags = ["--work-dir", tmp_path / "work", "--out", tmp_path / "maps", *tta]
    flags += ["--show-dir", tmp_path / "drawn"]
    assert main(["test-segmentor", str(config), str(trained), *map(str, flags)]) == 0
    maps = sorted((tmp_path / "maps").iterdir())
    assert len(maps) == 2 == len(list((tmp_path / "drawn").rglob("*.png")))
    for path in maps:
        labels = np.asarray(Image.open(path))
        assert set(np.unique(labels)) <= set(range(1, 8)), path  # ADE20K counts from 1


def test_label_maps_take_no_other_files_place(
    config: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two images of one name have two maps and two drawings; a folder of images gets none."""
    sizes = {}
    for kind, suffix in (("images", ".jpg"), ("annotations", ".png")):
        source = config.parent / "ade" / kind / "validation"
        for index, path in enumerate(sorted(source.iterdir())):
            target = tmp_path / "ade" / kind / "validation" / str(index) / f"x{suffix}"
            target.parent.mkdir(parents=True)
            target.write_bytes(path.read_bytes())
            with Image.open(target) as image:
                sizes[index] = image.size
    options = ["--cfg-options", f"test_dataloader.dataset.data_root={tmp_path / 'ade'}"]
    flags = [str(config), str(trained), "--work-dir", str(tmp_path / "work"), *options]
    out = tmp_path / "out"
    assert main(["test-segmentor", *flags, "--out", str(out), "--show-dir", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["x-2.png", "x-3.png", "x-4.png", "x.png"]
    found = sorted(Image.open(path).size for path in out.iterdir() if Image.open(path).mode == "L")
    assert found == sorted(sizes.values())
    flags[3] = str(tmp_path / "other")
    inside = tmp_path / "ade/images/validation/0/maps"
    assert main(["test-segmentor", *flags, "--out", str(inside)]) == 2
    assert "the next run would take results for images" in capsys.readouterr().err
    assert not inside.exists() and not (tmp_path / "other").exists()


def test_no_augmentation_to_test_with(
    config: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare.py"
    bare.write_text(config.read_text().replace("tta_pipeline", "other_pipeline"))
    assert main(["test-segmentor", str(bare), str(trained), "--tta"]) == 2
    assert f"--tta: {bare} has no tta_pipeline" in capsys.readouterr().err
