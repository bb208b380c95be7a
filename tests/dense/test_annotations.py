"""Annotations counted and compared with classes, without mmdet and mmseg."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitlinear.dense.instances import check_instances, count_instances
from vitlinear.dense.label_maps import LabelMaps, check_labels, count_labels
from vitlinear.errors import UserError

CLASSES = ("ant", "bee", "cat")
CONTENT: dict[str, Any] = {
    "categories": [{"id": 3, "name": "ant"}, {"id": 1, "name": "bee"}, {"id": 7, "name": "cat"}],
    "images": [{"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in (1, 2)],
    "annotations": [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]}
        for i, (image, category, box) in enumerate(
            [
                (1, 3, [1, 2, 10, 5]),
                (1, 1, [0, 0, 40, 30]),
                (2, 1, [5, 5, 3, 3]),
                (2, 3, [5, 5, 0, 9]),  # no area
                (2, 7, [50, 5, 3, 3]),  # outside
                (9, 7, [5, 5, 3, 3]),  # no such image
            ]
        )
    ],
}
CONTENT["annotations"][0]["segmentation"] = [[1, 2, 11, 2, 11, 7]]
CONTENT["annotations"].append({**CONTENT["annotations"][2], "id": 6, "iscrowd": 1})
CONTENT["annotations"].append({**CONTENT["annotations"][2], "id": 7, "ignore": True})


def write(folder: Path, change: Callable[[dict[str, Any]], object] = lambda content: None) -> Path:
    content = copy.deepcopy(CONTENT)
    change(content)
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def test_counts_of_instances(tmp_path: Path) -> None:
    path = write(tmp_path)
    found = count_instances(path)
    assert (found.images, found.categories) == (2, ["ant", "bee", "cat"])
    assert (found.boxes, found.crowds, found.outlines) == ({"ant": 1, "bee": 2}, {"bee": 1}, 1)
    assert sum(count for count, _ in found.left_out.values()) == 4
    said = check_instances(found, CLASSES, path, "k", outlines=True)
    assert f"{path}: 2 images, 3 boxes: ant 1, bee 2, cat 0; 1 of crowds" in said
    assert "left out: 1 without an area, or less than a pixel wide or high (id 3)" in said
    some = check_instances(found, ["bee"], path, "k")
    assert "2 boxes: bee 2" in some and "1 of categories that k leaves out (ant)" in some


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (("bee", "ant", "cat"), r"another order .* write \('ant', 'bee', 'cat'\)"),
        (("ant", "ant", "bee"), "a name twice"),
        (("ant", "Bee", "cat"), r"'Bee', which .*instances\.json does not have \(did you mean bee"),
        (("dog", "emu", "fox"), "its categories are ant, bee, cat"),
        (("cat",), "no box of any class .*; left out: .*1 outside of their image"),
    ],
)
def test_classes_that_do_not_fit(classes: tuple[str, ...], says: str, tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(UserError, match=says) as caught:
        check_instances(count_instances(path), classes, path, "k")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def narrow(content: dict[str, Any]) -> None:
    for annotation in content["annotations"]:
        annotation["bbox"][2] = 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: content["annotations"].clear(), "no box of any class"),
        (lambda content: content.pop("annotations"), "no box of any class"),
        (narrow, "no box of any class .*less than a pixel wide"),
        (lambda content: content["annotations"][2].update(category_id=8), "category_id 8 is none"),
        (lambda content: content["annotations"][2].update(bbox=[1, 2, 3]), "annotation .*'id': 2"),
        (lambda content: content["annotations"][2].update(bbox=[1, 2, float("nan"), 3]), "finite"),
        (lambda content: content["annotations"][2].pop("area"), "annotation .*: has no 'area'"),
        (lambda content: content["images"][0].pop("width"), "'width' is missing"),
        (lambda content: content.pop("categories"), "'categories' is missing"),
        (lambda content: content["categories"][0].update(id=1), "two categories of one id"),
        (lambda content: content["annotations"][0].pop("segmentation"), "no outlines"),
    ],
)
def test_files_that_cannot_be_meant(
    change: Callable[[dict[str, Any]], object], says: str, tmp_path: Path
) -> None:
    path = write(tmp_path, change)
    with pytest.raises(UserError, match=says) as caught:
        check_instances(count_instances(path), CLASSES, path, "k", outlines=True)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_file_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json is not JSON"):
        count_instances(tmp_path / "a.json")


def decode(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.array(image)


def count(folder: Path, *labels: Any, size: tuple[int, int] | None = None) -> LabelMaps:
    """Counts of maps that hold these values, each beside an image."""
    pairs = []
    for index, values in enumerate(labels):
        image, path = folder / f"{index}.jpg", folder / f"{index}.png"
        array = np.asarray(values)
        Image.fromarray(array).save(path, "TIFF" if array.dtype.kind == "i" else "PNG")
        Image.new("RGB", size or array.shape[1::-1]).save(image)
        pairs.append((str(image), str(path)))
    return count_labels(pairs, decode)


def grey(*values: int) -> np.ndarray:
    return np.array([values] * 2, np.uint8)


def test_counts_of_labels(tmp_path: Path) -> None:
    found = count(tmp_path, grey(0, 1, 2, 2), grey(0, 255, 0, 0))
    assert (found.maps, found.pixels) == (2, {0: 8, 1: 2, 2: 4, 255: 2})
    assert found.example[255].endswith("1.png") and found.example[0].endswith("0.png")
    said = check_labels(found, CLASSES, "k")
    assert said.startswith(
        "k: 2 label maps: ant 50.00%, bee 12.50%, cat 25.00%; counts nowhere: 12"
    )
    said = check_labels(found, CLASSES, "k", reduce_zero_label=True)
    assert "ant 12.50%, bee 25.00%, cat 0.00%; counts nowhere: 62.50%" in said
    said = check_labels(found, ("cat", "ant"), "k", label_map={0: 1, 1: 255, 2: 0})
    assert "cat 25.00%, ant 50.00%; counts nowhere: 25.00%" in said


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        ((0, 255), {}, "only class 'ant', with values 0, 255"),
        ((1, 255), {}, "only class 'bee', with values 1, 255"),
        ((0, 0), {}, "only class 'ant'"),
        ((255, 255), {}, "only no class"),
        ((0, 1), {"reduce_zero_label": True}, "only class 'ant', .*reduce_zero_label=True 0 count"),
        ((0, 255), {"reduce_zero_label": True}, "only no class"),
        ((1, 255), {"train": False}, "only class 'bee'"),
        ((0, 3), {}, r"0\.png has the value 3, which is no class: k has 3 .* values 0 to 2; 255"),
        ((1, 2, 4), {"reduce_zero_label": True}, "value 4.*values 1 to 3; 0 and 255"),
    ],
)
def test_labels_that_cannot_be_meant(
    values: tuple[int, ...], options: dict[str, bool], says: str, tmp_path: Path
) -> None:
    found = count(tmp_path, grey(*values))
    with pytest.raises(UserError, match=says) as caught:
        check_labels(found, CLASSES, "k", **options)
    assert "\n" not in str(caught.value)


def test_a_held_out_set_may_have_one_class(tmp_path: Path) -> None:
    assert "bee 100.00%" in check_labels(count(tmp_path, grey(1, 1)), CLASSES, "k", train=False)


@pytest.mark.parametrize(
    ("values", "size", "says"),
    [
        (np.zeros((4, 4, 3), np.uint8), None, r"0\.png has 3 channels"),
        (np.full((4, 4), 256, np.uint16), None, r"0\.png has the value 256"),
        (np.full((4, 4), -1, np.int32), None, r"0\.png has the value -1"),
        (grey(0, 1, 2), (3, 4), r"0\.png is 3 x 2 pixels, its image .*0\.jpg 3 x 4"),
    ],
)
def test_maps_that_cannot_be_read_so(
    values: np.ndarray, size: tuple[int, int] | None, says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        count(tmp_path, values, size=size)
    assert "\n" not in str(caught.value)


def test_maps_that_are_not_there(tmp_path: Path) -> None:
    pair = (str(tmp_path / "a.jpg"), str(tmp_path / "a.png"))
    with pytest.raises(UserError, match=r"a\.jpg has no label map: .*a\.png does not exist"):
        count_labels([pair], decode)
    (tmp_path / "a.png").write_text("junk")
    with pytest.raises(UserError, match=r"cannot read image .*a\.png: not an image"):
        count_labels([pair], decode)
    Image.fromarray(grey(1)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.jpg does not exist"):
        count_labels([pair], decode)


def test_a_photograph_that_is_stored_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (2, 4)).save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(grey(0, 1, 2, 1)).save(tmp_path / "a.png")
    assert count_labels([(str(tmp_path / "a.jpg"), str(tmp_path / "a.png"))], decode).maps == 1
