"""Aerial photographs with boxes around tree crowns, from the PyPI package deepforest, as COCO.

The package (MIT) ships pictures of about 10 cm a pixel of three sites of NEON, the US National
Ecological Observatory Network, annotated by its authors: Weinstein et al., "DeepForest: A Python
package for RGB deep learning tree crown delineation", doi:10.1111/2041-210X.13472.
"""

import csv
import math
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from PIL import Image

from vitlinear.data.images import DAMAGE, UnreadableImage
from vitlinear.errors import UserError, one_line

from .coco import new_folder, save_jpeg, write_instances

COLUMNS = ("xmin", "ymin", "xmax", "ymax", "label")
IMAGE_COLUMN = "image_path"
HELD_OUT = ("2019_YELL_2_541000_4977000_image_crop",)
# A crown of which a tile shows less counts neither as found nor as missed.
VISIBLE = 0.5


class Box(NamedTuple):
    """Left, upper, right and lower edge in pixels, and what is inside."""

    xmin: float
    ymin: float
    xmax: float
    ymax: float
    label: str


def convert(
    source: Path,
    output: Path,
    tile: int = 400,
    held_out: Sequence[str] = HELD_OUT,
    category: str | None = "tree",
) -> dict[str, int]:
    """Writes tiles and their boxes: ``images``, ``annotations/instances_{train,val}.json``.

    Pictures are cut into equal tiles that do not overlap. A box is cut at the edges of each tile
    that it reaches into; where less than half of it is left, that part is ``iscrowd``, which
    training and `CocoMetric` take for a place to ignore. The held-out pictures are other places
    than the rest, so no tree is in both.

    Args:
        source: The wheel (``pip download --no-deps deepforest``), or a folder of pictures and
            annotations: beside ``NAME.png`` a Pascal VOC ``NAME.xml``, or rows of any ``*.csv``
            with `IMAGE_COLUMN` and `COLUMNS`. Where a picture has both, XML counts: the package's
            ``example.csv`` lists but 79 of the 279 trees on its picture.
        output: Folder; is made.
        tile: Largest side of a tile, in pixels.
        held_out: Names without suffix of the pictures for ``val``.
        category: What every box is; None keeps the labels.

    Returns:
        ``train_images``, ``train_boxes``, ``val_images``, ``val_boxes``.

    Raises:
        UserError: What was wrong with the source.
    """
    if source.is_file():
        with tempfile.TemporaryDirectory() as unpacked:
            return convert(_unpack(source, Path(unpacked)), output, tile, held_out, category)
    if not source.is_dir():
        raise UserError(f"{source} does not exist: give deepforest's wheel, or a folder")
    pictures = read_annotations(source)
    absent = sorted(set(held_out) - {path.stem for path in pictures})
    if absent:
        names = ", ".join(path.stem for path in pictures)
        raise UserError(f"no annotated picture is called {', '.join(absent)}: there are {names}")
    if len(set(held_out)) == len(pictures):
        raise UserError("every picture is held out: leave some for training")
    labels = sorted({box.label for boxes in pictures.values() for box in boxes})
    names = labels if category is None else [category]
    categories = [{"id": place, "name": name} for place, name in enumerate(names, 1)]
    numbers = {label: names.index(label) + 1 if category is None else 1 for label in labels}
    counts = {}
    with new_folder(output) as new:
        (new / "images").mkdir()
        for split in ("train", "val"):
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            for path, boxes in pictures.items():
                if (path.stem in held_out) == (split == "val"):
                    _cut(path, boxes, tile, numbers, new / "images", images, annotations)
            info = {"description": f"deepforest's aerial photographs, {split}"}
            write_instances(new, split, images, annotations, categories, {"info": info})
            counts[f"{split}_images"] = len(images)
            counts[f"{split}_boxes"] = sum(not item["iscrowd"] for item in annotations)
    return counts


def read_annotations(folder: Path) -> dict[Path, list[Box]]:
    """Returns the boxes of each annotated picture, pictures in order of their names.

    Raises:
        UserError: A file cannot be read, lacks something, or names a picture that is not there;
            or two pictures in different folders have one name.
    """
    listed: dict[Path, list[Box]] = {}
    for file in sorted(folder.glob("*.csv")):
        for name, box in _read_csv(file):
            boxes = listed.setdefault(folder / name, [])
            if box not in boxes:  # a picture may be listed in several files
                boxes.append(box)
    # By path without suffix: a picture may be there as PNG and as TIFF.
    chosen = {path.with_suffix(""): (path, boxes) for path, boxes in sorted(listed.items())}
    for file in sorted(folder.glob("*.xml")):
        name, boxes = _read_voc(file)
        chosen[(folder / name).with_suffix("")] = (folder / name, boxes)
    if not chosen:
        raise UserError(f"{folder} holds no annotations: *.csv or *.xml of Pascal VOC")
    stems: dict[str, Path] = {}
    for path, _ in chosen.values():
        if not path.is_file():
            raise UserError(f"picture {path} does not exist, but is annotated")
        other = stems.setdefault(path.stem, path)
        if other != path:
            raise UserError(
                f"{other} and {path} have one name, which their tiles would share: rename one, in "
                "its annotations too"
            )
    return dict(sorted(chosen.values()))


def _unpack(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("deepforest/data/")]
            archive.extractall(folder, names)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {wheel}: {one_line(error)}") from error
    if not names:
        raise UserError(f"{wheel} holds no deepforest/data: pip download --no-deps deepforest")
    return folder / "deepforest" / "data"


def _read_csv(path: Path) -> list[tuple[str, Box]]:
    try:
        return _boxes_of_csv(path)
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(
            f"cannot read {path}: {one_line(error)}; it has to be CSV in UTF-8"
        ) from error


def _boxes_of_csv(path: Path) -> list[tuple[str, Box]]:
    # With or without the mark that spreadsheets put before the first column's name.
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        names = rows.fieldnames or ()
        if IMAGE_COLUMN not in names:  # such as a list of classes
            return []
        absent = [name for name in COLUMNS if name not in names]
        if absent:
            has = ", ".join(names)
            raise UserError(f"{path} lacks the column {', '.join(absent)}: it has {has}")
        found = []
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if not row[IMAGE_COLUMN]:
                raise UserError(f"{where}: no picture is named")
            found.append((row[IMAGE_COLUMN], _box(where, *(row[key] for key in COLUMNS))))
        return found


def _read_voc(path: Path) -> tuple[str, list[Box]]:
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    name = root.findtext("filename")
    if not name:
        raise UserError(f"{path} names no picture: Pascal VOC has <filename>")
    boxes = [
        _box(
            f"{path}, object {place}",
            *(item.findtext(f"bndbox/{key}") for key in COLUMNS[:4]),
            item.findtext("name"),
        )
        for place, item in enumerate(root.iter("object"), 1)
    ]
    return name, boxes


def _box(where: str, *values: str | None) -> Box:
    try:
        left, upper, right, lower = (float(value or "") for value in values[:4])
    except ValueError:
        raise UserError(f"{where}: {values[:4]} are not the four edges of a box") from None
    if not (left < right and upper < lower and math.isfinite(right - left + lower - upper)):
        raise UserError(f"{where}: a box from {left, upper} to {right, lower} has no inside")
    if not values[4]:
        raise UserError(f"{where}: no label")
    return Box(left, upper, right, lower, values[4])


def _cut(
    path: Path,
    boxes: Sequence[Box],
    tile: int,
    categories: dict[str, int],
    folder: Path,
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
) -> None:
    """Writes the tiles of a picture, and adds their records to the two lists."""
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except DAMAGE as error:
        raise UnreadableImage(path, error).as_user_error() from error
    for upper, lower in _spans(picture.height, tile):
        for left, right in _spans(picture.width, tile):
            name = f"{path.stem}_{left}_{upper}.jpg"
            save_jpeg(picture.crop((left, upper, right, lower)), folder / name)
            image = {"id": len(images) + 1, "file_name": name}
            images.append({**image, "width": right - left, "height": lower - upper})
            for box in boxes:
                x0, x1 = max(box.xmin, left), min(box.xmax, right)
                y0, y1 = max(box.ymin, upper), min(box.ymax, lower)
                if x0 >= x1 or y0 >= y1:
                    continue
                area = (x1 - x0) * (y1 - y0)
                whole = (box.xmax - box.xmin) * (box.ymax - box.ymin)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image["id"],
                        "category_id": categories[box.label],
                        "bbox": [x0 - left, y0 - upper, x1 - x0, y1 - y0],
                        "area": area,
                        "iscrowd": int(area < VISIBLE * whole),
                    }
                )


def _spans(length: int, tile: int) -> list[tuple[int, int]]:
    """Returns the fewest equal parts of a length that are no longer than a tile."""
    count = math.ceil(length / tile)
    edges = [round(place * length / count) for place in range(count + 1)]
    return list(zip(edges, edges[1:], strict=False))
