"""The sample in COCO format, and what it is made of."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vitlinear.dense import coco
from vitlinear.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("skimage")
    path = tmp_path_factory.mktemp("sample") / "coco"
    coco.write_sample(path)
    return path


def instances(folder: Path, split: str) -> dict:
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def outline(polygons: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    mask = Image.new("1", size)
    for polygon in polygons:
        ImageDraw.Draw(mask).polygon(polygon, fill=1)
    return np.array(mask)


@pytest.mark.quick
@pytest.mark.parametrize(("split", "images", "objects"), [("train", 5, 18), ("val", 2, 13)])
def test_boxes_and_areas_are_those_of_the_outlines(
    folder: Path, split: str, images: int, objects: int
) -> None:
    data = instances(folder, split)
    assert (len(data["images"]), len(data["annotations"])) == (images, objects)
    licences = {licence["id"] for licence in data["licenses"]}
    by_id = {image["id"]: image for image in data["images"]}
    for image in data["images"]:
        assert image["license"] in licences
        with Image.open(folder / "images" / image["file_name"]) as file:
            assert file.size == (image["width"], image["height"]) and file.mode == "RGB"
    for annotation in data["annotations"]:
        image = by_id[annotation["image_id"]]
        mask = outline(annotation["segmentation"], (image["width"], image["height"]))
        rows, columns = mask.nonzero()
        left, upper, width, height = annotation["bbox"]
        drawn = (columns.min(), rows.min(), columns.max(), rows.max())
        assert drawn == pytest.approx((left, upper, left + width, upper + height), abs=1)
        # The pixels that Pillow fills reach half a pixel over the outline.
        assert mask.sum() == pytest.approx(annotation["area"], rel=0.06)


def test_an_outline_holds_one_thing(folder: Path) -> None:
    """Coins are lighter than the cloth between them, and no two outlines overlap."""
    for split, name in (("train", "coins_top.jpg"), ("val", "coins_bottom.jpg")):
        data = instances(folder, split)
        (image,) = (image for image in data["images"] if image["file_name"] == name)
        grey = np.array(Image.open(folder / "images" / name).convert("L")).astype(float)
        masks = [
            outline(annotation["segmentation"], grey.shape[::-1])
            for annotation in data["annotations"]
            if annotation["image_id"] == image["id"]
        ]
        assert len(masks) == 12
        assert np.sum(masks, axis=0).max() == 1
        cloth = grey[~np.any(masks, axis=0)]
        assert all(np.median(grey[mask]) > np.median(cloth) + 40 for mask in masks)


def test_splits_share_nothing() -> None:
    """A photograph that both have a part of is cut, and the parts do not overlap."""
    regions: dict[str, np.ndarray] = {}
    for image in coco.sample()["images"]:
        left, upper, right, lower = image["crop"]
        assert (right - left, lower - upper) == (image["width"], image["height"])
        taken = regions.setdefault(image["source"], np.zeros((1024, 1024), int))
        taken[upper:lower, left:right] += 1
        assert taken.max() == 1


def test_a_full_folder_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="exists and is not empty"):
        coco.write_sample(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_without_the_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scikit-image"):
        coco.write_sample(tmp_path / "coco")
    assert not any(tmp_path.iterdir())


def test_another_photograph(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    changed = {**coco.sample()["images"][0], "sha256": "0" * 64}
    with pytest.raises(UserError, match=r"astronaut\.png is not the photograph"):
        coco.read_photograph(changed)
