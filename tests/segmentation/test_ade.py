"""The sample in the layout of ADE20K."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vitlinear.dense import ade, coco


@pytest.mark.quick
def test_label_maps_agree_with_the_outlines(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    coco.write_sample(tmp_path / "coco")
    ade.write_sample(tmp_path / "ade")
    licences = (tmp_path / "ade" / "LICENSE.txt").read_text()
    assert "coins_top.jpg: No known copyright restrictions" in licences
    assert "annotations: Apache-2.0" in licences
    for split, images in (("train", 5), ("val", 2)):
        text = (tmp_path / "coco" / "annotations" / f"instances_{split}.json").read_text()
        data = json.loads(text)
        folder = ade.FOLDERS[split]
        maps = sorted((tmp_path / "ade" / "annotations" / folder).iterdir())
        pictures = sorted((tmp_path / "ade" / "images" / folder).iterdir())
        assert [path.stem for path in maps] == [path.stem for path in pictures]
        assert len(maps) == images
        by_stem = {Path(image["file_name"]).stem: image["id"] for image in data["images"]}
        for path, picture in zip(maps, pictures, strict=True):
            same = tmp_path / "coco" / "images" / picture.name
            assert picture.read_bytes() == same.read_bytes()
            with Image.open(path) as file:
                assert file.mode == "L"
                labels = np.array(file)
            outside = np.ones_like(labels, dtype=bool)
            for annotation in data["annotations"]:
                if annotation["image_id"] != by_stem[path.stem]:
                    continue
                mask = Image.new("1", labels.shape[::-1])
                for polygon in annotation["segmentation"]:
                    ImageDraw.Draw(mask).polygon(polygon, fill=1)
                inside = np.array(mask)
                outside &= ~inside
                label = annotation["category_id"] + 1
                assert ade.classes()[label - 1] == data["categories"][label - 2]["name"]
                # ignored: some band along the outline, another object's with it
                assert set(np.unique(labels[inside])) <= {0, label}
                assert np.mean(labels[inside] == label) > 0.5
            assert set(np.unique(labels[outside])) <= {0, 1}
            assert np.mean(labels == 0) < 0.13


@pytest.mark.quick
def test_the_band_is_as_wide_as_it_says() -> None:
    square = [10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]
    row = np.array(ade.draw_label_map((40, 40), [(3, [square])]))[20]
    assert row[2] == 1 and row[20] == 3 and row[38] == 1
    assert 2 * ade.BAND - 1 <= np.sum(row[:20] == 0) <= 2 * ade.BAND + 1
    assert row[10] == 0 and row[30] == 0
