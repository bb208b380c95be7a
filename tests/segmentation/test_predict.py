"""``vitlinear predict --task segmentation``: label maps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.dense.openmmlab import packages
from vitlinear_cli import main

pytestmark = packages()

from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS, init_default_scope  # noqa: E402

CONFIG = Path(__file__).resolve().parents[2] / "configs/segmentation/upernet_test-ravlt_sample.py"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A config; ``model.pth`` beside holds its weights, as they are drawn."""
    config = Config.fromfile(CONFIG)
    init_default_scope("mmseg")
    torch.manual_seed(1)
    model = MODELS.build(config.model)
    model.init_weights()
    meta = {"dataset_meta": config.metainfo.to_dict()}
    torch.save({"state_dict": model.state_dict(), "meta": meta}, tmp_path / "model.pth")
    return config


def test_label_maps_and_drawings_of_one_name(config: Config, tmp_path: Path) -> None:
    """The label map of one image would have the name of the drawing of another."""
    images = [tmp_path / name for name in ("cat.jpg", "cat_labels.jpg")]
    for index, image in enumerate(images):
        Image.new("RGB", (60 + index, 60)).save(image)
    arguments = ["predict", "--task", "segmentation", CONFIG, tmp_path / "model.pth", *images]
    arguments += ["--out", tmp_path / "out", "--results-file", tmp_path / "results.json"]
    assert main([str(item) for item in arguments]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    for index, result in enumerate(results):
        for key, mode in (("drawn", "RGB"), ("label_map", "L")):
            with Image.open(result[key]) as file:
                assert (file.mode, file.size) == (mode, (60 + index, 60))
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_label_maps(config: Config, tmp_path: Path) -> None:
    from mmseg.apis import inference_model, init_model

    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    photo = tmp_path / "photo.png"
    Image.fromarray(noise).resize((180, 120)).save(photo)
    arguments = ["predict", "--task", "segmentation", CONFIG, tmp_path / "model.pth", photo]
    arguments += ["--out", tmp_path / "out", "--results-file", tmp_path / "results.json"]
    assert main([str(item) for item in arguments]) == 0
    (result,) = json.loads((tmp_path / "results.json").read_text())
    with Image.open(result["label_map"]) as file:
        assert file.mode == "L" and file.size == (180, 120)
        labels = np.array(file)
    shares = {item["index"]: item["share"] for item in result["classes"]}
    assert sum(shares.values()) == pytest.approx(1)
    for item in result["classes"]:
        assert np.mean(labels == item["index"]) == pytest.approx(item["share"])
        assert config.metainfo.classes[item["index"]] == item["class"]
    reference = init_model(Config.fromfile(CONFIG), str(tmp_path / "model.pth"), device="cpu")
    expected = inference_model(reference, str(photo)).pred_sem_seg.data[0].numpy()
    assert np.mean(labels == expected) > 0.999
    with Image.open(result["drawn"]) as drawing:
        assert drawing.size == (180, 120)
        pixel = np.array(drawing)[100, 150]
    with Image.open(photo) as image:
        below = np.array(image)[100, 150].astype(float)
    color = np.array(config.metainfo.palette[labels[100, 150]])
    assert np.abs(pixel - (below + color) / 2).max() <= 1.5
