"""``vitlinear predict --task detection``: boxes and masks, drawn and as JSON."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.dense.openmmlab import packages
from vitlinear_cli import main

pytestmark = packages()

from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS, init_default_scope  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "detection"
RETINANET = CONFIGS / "retinanet_test-ravlt_fpn_sample.py"
MASK_RCNN = CONFIGS / "mask-rcnn_test-ravlt_fpn_sample.py"
NAMES = ("person", "cat", "cup", "spoon", "coin", "rocket")


def write_checkpoint(path: Path, config: Path, meta: dict[str, Any]) -> Path:
    """Weights as they are drawn: what such a model finds is noise, but it is always the same."""
    settings = Config.fromfile(config)
    init_default_scope(settings.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(settings.model)
    model.init_weights()
    torch.save({"state_dict": model.state_dict(), "meta": meta}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures of the same name, and a checkpoint that does not name its classes."""
    path = tmp_path_factory.mktemp("predict")
    noise = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    for name in ("one", "two"):
        (path / name).mkdir()
        Image.fromarray(noise).save(path / name / "photo.v2.png")
        noise = noise[:, :100]
    write_checkpoint(path / "retinanet.pth", RETINANET, {})
    return path


def predict(*arguments: object) -> int:
    return main(["predict", "--task", "detection", *(str(item) for item in arguments)])


def test_boxes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--out", tmp_path / "out", "--score-thr", 0.0, "--json")
    code = predict(RETINANET, folder / "retinanet.pth", folder / "one", folder / "two", *flags)
    out, err = capsys.readouterr()
    assert code == 0, err
    results = json.loads(out[out.index("[\n") :])
    drawn = [Path(result["drawn"]).name for result in results]
    assert drawn == ["photo.v2.png", "photo.v2-2.png"]
    for result, width in zip(results, (120, 100), strict=True):
        with Image.open(result["file"]) as photo, Image.open(result["drawn"]) as drawing:
            assert drawing.size == photo.size == (width, 90)
            assert np.any(np.array(photo) != np.array(drawing)) == bool(result["detections"])
        for found in result["detections"]:
            assert found["class"] == NAMES[found["index"]]  # the config's
            left, upper, right, lower = found["box"]
            assert 0 <= left <= right <= width and 0 <= upper <= lower <= 90
            assert 0 <= found["score"] <= 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(drawn)


def test_no_two_results_of_one_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor one of an input's, nor one that was there before."""
    photo = folder / "one" / "photo.v2.png"
    images = [tmp_path / name for name in ("d1/cat.jpg", "d2/cat.jpg", "d3/cat-2.jpg", "cat.png")]
    for index, image in enumerate(images):
        image.parent.mkdir(exist_ok=True)
        with Image.open(photo) as picture:
            picture.crop((0, 0, 60 + index, 60)).save(image)
    before = [image.read_bytes() for image in images]
    results = tmp_path / "results.json"
    flags = (RETINANET, folder / "retinanet.pth", *images, "--results-file", results)
    assert predict(*flags, "--out", tmp_path) == 0
    first = json.loads(results.read_text())
    names = [Path(result["drawn"]).name for result in first]
    assert names == ["cat-2.png", "cat-3.png", "cat-2-2.png", "cat-4.png"]
    for index, result in enumerate(first):
        with Image.open(result["drawn"]) as drawing:
            assert drawing.size == (60 + index, 60)
    assert predict(*flags, "--out", tmp_path) == 0
    assert not {result["drawn"] for result in json.loads(results.read_text())} & {
        result["drawn"] for result in first
    }
    assert predict(*flags, "--out", tmp_path, "--overwrite") == 0
    assert [result["drawn"] for result in json.loads(results.read_text())] == [
        result["drawn"] for result in first
    ]
    assert [image.read_bytes() for image in images] == before
    capsys.readouterr()
    for out in (tmp_path, tmp_path / "d1"):  # a folder that is read, and one in it
        assert predict(RETINANET, folder / "retinanet.pth", tmp_path, "--out", out) == 2
        assert "the next run would take results for images" in capsys.readouterr().err
    assert predict(*flags[:-1], images[0], "--out", tmp_path / "drawn") == 2
    assert f"cannot write {images[0]}: the command reads it" in capsys.readouterr().err
    assert [image.read_bytes() for image in images] == before


def test_what_it_reports_is_what_mmdet_finds(folder: Path, tmp_path: Path) -> None:
    from mmdet.apis import inference_detector, init_detector

    threshold, photo = 0.0101, folder / "one" / "photo.v2.png"
    results = tmp_path / "results.json"
    flags = ("--out", tmp_path / "out", "--score-thr", threshold, "--results-file", results)
    options = "model.test_cfg.score_thr=0.0"
    checkpoint = folder / "retinanet.pth"
    assert predict(RETINANET, checkpoint, photo, *flags, "--cfg-options", options) == 0
    found = json.loads(results.read_text())[0]["detections"]
    config = Config.fromfile(RETINANET)
    config.model.test_cfg.score_thr = 0.0
    model = init_detector(config, str(checkpoint), palette="random", device="cpu")
    expected = inference_detector(model, str(photo)).pred_instances
    expected = expected[expected.scores >= threshold]
    assert 0 < len(found) == len(expected)
    boxes = torch.tensor([item["box"] for item in found])
    assert torch.allclose(boxes, expected.bboxes, atol=1e-3)
    assert [item["index"] for item in found] == expected.labels.tolist()


def test_masks_and_names_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    from pycocotools import mask as coco

    names = [name.upper() for name in NAMES]
    meta = {"dataset_meta": {"classes": names}}
    checkpoint = write_checkpoint(tmp_path / "mask.pth", MASK_RCNN, meta)
    results = tmp_path / "results.json"
    flags = ("--out", tmp_path, "--score-thr", 0.0, "--results-file", results)
    assert predict(MASK_RCNN, checkpoint, folder / "one", *flags) == 0
    (result,) = json.loads(results.read_text())
    assert result["detections"]
    for found in result["detections"]:
        assert found["class"] == names[found["index"]]
        mask = coco.decode(found["segmentation"])
        assert mask.shape == (90, 120)
        rows, columns = mask.nonzero()
        left, upper, right, lower = found["box"]
        assert np.all((columns > left - 2) & (columns < right + 1))
        assert np.all((rows > upper - 2) & (rows < lower + 1))


def test_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, photo = folder / "retinanet.pth", folder / "one" / "photo.v2.png"
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:500])
    few = tmp_path / "few.pth"
    meta = {"dataset_meta": {"classes": ("cat", "dog")}}
    torch.save({**torch.load(checkpoint, weights_only=True), "meta": meta}, few)
    out = tmp_path / "out"
    for arguments, says in (
        ((MASK_RCNN, checkpoint, photo), "is not of this config's model"),
        ((tmp_path / "none.py", checkpoint, photo), "none.py does not exist"),
        ((RETINANET, tmp_path / "none.pth", photo), "none.pth does not exist"),
        ((RETINANET, checkpoint, tmp_path / "none.png"), "none.png does not exist"),
        ((RETINANET, checkpoint, photo, broken), "cannot read image"),
        ((RETINANET, checkpoint, broken, "--bad-images", "skip"), "none of 1 images"),
        ((RETINANET, checkpoint, photo, "--device", "warp"), "--device warp"),
        ((RETINANET, checkpoint, photo, "--cfg-options", "model.type=Nothing"), "Nothing"),
        ((RETINANET, few, photo), f"num_classes is 6, and {few} has 2 classes"),
    ):
        capsys.readouterr()
        assert predict(*arguments, "--out", out) == 2
        err = capsys.readouterr().err
        message = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(message) == 1 and says in message[0], err
        assert not out.exists()
    assert main(["predict", "--task", "detektion"]) == 2
    assert "invalid choice: 'detektion'" in capsys.readouterr().err


def test_bad_images_are_left_out_when_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    flags = ("--out", tmp_path / "out", "--bad-images", "skip")
    assert predict(RETINANET, folder / "retinanet.pth", broken, folder / "one", *flags) == 0
    out = capsys.readouterr().out
    assert f"left out: {broken}: not an image" in out
    assert f"{folder / 'one' / 'photo.v2.png'}: " in out


def test_names_of_any_bytes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / os.fsdecode(b"a\xff\nb.png")
    photo.write_bytes((folder / "one" / "photo.v2.png").read_bytes())
    assert predict(RETINANET, folder / "retinanet.pth", photo, "--out", tmp_path / "out") == 0
    (line,) = capsys.readouterr().out.splitlines()[-1:]
    assert line.startswith(f"{tmp_path}/a\\udcff\\nb.png: ") and "a\\udcff\\nb.png" in line[-20:]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [photo.name]
