"""Aerial photographs to COCO format."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitlinear.dense import deepforest
from vitlinear.errors import UserError

HEADER = "image_path,xmin,ymin,xmax,ymax,label\n"


def voc(name: str, *boxes: tuple[int, int, int, int]) -> str:
    edges = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join(
        "<object><name>Tree</name><bndbox>"
        + "".join(f"<{edge}>{value}</{edge}>" for edge, value in zip(edges, box, strict=True))
        + "</bndbox></object>"
        for box in boxes
    )
    return f"<annotation><filename>{name}</filename>{objects}</annotation>"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two places; one is there twice and listed in part only, as in the package."""
    folder = tmp_path / "source"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (100, 170, 3), dtype=np.uint8)
    for name in ("a.png", "a.tif", "b.png"):
        Image.fromarray(noise).save(folder / name)
    (folder / "a.csv").write_text(f"{HEADER}a.png,10,10,30,40,Tree\n")
    (folder / "a.xml").write_text(voc("a.tif", (10, 10, 30, 40), (80, 20, 100, 40)))
    (folder / "b.csv").write_text(f"{HEADER}b.png,5,5,25,25,Tree\nb.png,77,5,97,25,Snag\n")
    (folder / "classes.csv").write_text("Dead,0\nAlive,1\n")
    return folder


def load(output: Path, split: str) -> dict:
    return json.loads((output / "annotations" / f"instances_{split}.json").read_text())


def test_tiles_and_boxes(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "coco"
    counts = deepforest.convert(source, output, tile=100, held_out=["b"])
    assert counts == {"train_images": 2, "train_boxes": 2, "val_images": 2, "val_boxes": 2}
    train, val = load(output, "train"), load(output, "val")
    assert [image["file_name"] for image in train["images"]] == ["a_0_0.jpg", "a_85_0.jpg"]
    assert [image["width"] for image in train["images"]] == [85, 85]
    boxes = [(item["image_id"], item["bbox"], item["iscrowd"]) for item in train["annotations"]]
    # the second tree lies across the tiles' border, five columns of it on the left
    assert boxes == [
        (1, [10, 10, 20, 30], 0),
        (1, [80, 20, 5, 20], 1),
        (2, [0, 20, 15, 20], 0),
    ]
    assert [item["iscrowd"] for item in val["annotations"]] == [0, 1, 0]
    assert val["categories"] == [{"id": 1, "name": "tree"}]
    for image in train["images"] + val["images"]:
        with Image.open(output / "images" / image["file_name"]) as file:
            assert file.size == (image["width"], image["height"])
    with (
        Image.open(output / "images" / "a_85_0.jpg") as file,
        Image.open(source / "a.png") as whole,
    ):
        difference = np.array(file).astype(int) - np.array(whole.crop((85, 0, 170, 100)))
    assert np.abs(difference).mean() < 8


def test_labels_are_kept_when_asked(source: Path, tmp_path: Path) -> None:
    deepforest.convert(source, tmp_path / "coco", 200, ["b"], category=None)
    val = load(tmp_path / "coco", "val")
    assert [item["name"] for item in val["categories"]] == ["Snag", "Tree"]
    assert [item["category_id"] for item in val["annotations"]] == [2, 1]
    assert load(tmp_path / "coco", "train")["categories"] == val["categories"]


def test_a_wheel(source: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "deepforest.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in source.iterdir():
            archive.write(path, f"deepforest/data/{path.name}")
    deepforest.convert(wheel, tmp_path / "one", held_out=["b"])
    deepforest.convert(source, tmp_path / "two", held_out=["b"])
    assert load(tmp_path / "one", "train") == load(tmp_path / "two", "train")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("b.csv", "image_path,xmin,ymin,xmax,label\nb.png,1,2,3,Tree\n", "lacks the column ymax"),
        ("b.csv", f"{HEADER}c.png,5,5,25,25,Tree\n", r"c\.png does not exist"),
        ("b.csv", f"{HEADER}b.png,5,5,x,25,Tree\n", "line 2.*not the four edges"),
        ("b.csv", f"{HEADER}b.png,5,5,5,25,Tree\n", "line 2.*no inside"),
        ("b.csv", f"{HEADER}b.png,5,5,nan,25,Tree\n", "line 2.*no inside"),
        ("b.csv", f"{HEADER}b.png,5,5,25,25,\n", "line 2: no label"),
        ("b.csv", f"{HEADER}b.png,5,5\n", "line 2.*not the four edges"),
        ("b.csv", f"{HEADER},5,5,25,25,Tree\n", "line 2: no picture is named"),
        ("b.csv", f"{HEADER}b.png,5,5,25,25,B\xe4um\n".encode("latin-1"), r"b\.csv: .*in UTF-8"),
        ("b.csv", HEADER + "b" * 200_000, r"cannot read .*b\.csv: field larger.*in UTF-8"),
        ("b.csv", f"{HEADER}sub/a.png,5,5,25,25,Tree\n", r"a\.tif and .*sub/a\.png have one name"),
        ("b.csv", "b.png,5,5,25,25\n", "no annotated picture is called b: there are a"),
        ("a.xml", "<annotation>", r"cannot read .*a\.xml"),
        ("a.xml", "<?xml version='1.0' encoding='utf-9'?><a/>", r"cannot read .*a\.xml"),
        ("a.xml", "<annotation/>", "names no picture"),
        ("a.tif", "not a picture", r"cannot read image .*a\.tif: not an image"),
    ],
)
def test_mistakes_leave_nothing(
    source: Path, tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    (source / "sub").mkdir()
    shutil.copy(source / "a.png", source / "sub" / "a.png")
    (source / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=says):
        deepforest.convert(source, tmp_path / "coco", held_out=["b"])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_pictures_of_one_name_in_two_formats_and_folders(source: Path) -> None:
    """One picture in a folder, whatever its format; also where a spreadsheet wrote the file."""
    (source / "sub").mkdir()
    (source / "b.png").rename(source / "sub" / "c.png")
    (source / "b.csv").write_bytes(f"{HEADER}sub/c.png,5,5,25,25,Tree\n".encode("utf-8-sig"))
    assert list(deepforest.read_annotations(source)) == [source / "a.tif", source / "sub/c.png"]


def test_other_sources(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="every picture is held out"):
        deepforest.convert(source, tmp_path / "coco", held_out=["a", "b"])
    with pytest.raises(UserError, match="does not exist"):
        deepforest.convert(tmp_path / "none", tmp_path / "coco")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no annotations"):
        deepforest.convert(tmp_path / "empty", tmp_path / "coco")
    with pytest.raises(UserError, match="cannot read .*: File is not a zip file"):
        deepforest.convert(source / "a.png", tmp_path / "coco")
