"""A small COCO-format data set of real photographs, and what writing one in that format takes.

The photographs are those inside every scikit-image package; ``sample.json`` beside this file says
of each where it is from and under which terms, and holds our outlines of what is seen on them.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from vitlinear.errors import UserError, one_line

SPLITS = ("train", "val")


@lru_cache
def sample() -> dict[str, Any]:
    """Returns what ``sample.json`` holds; not to be changed.

    COCO's ``info``, ``licenses``, ``categories``, ``images`` and ``annotations``, but for two
    things: an image also has its ``split``, the file of scikit-image that it is cut from
    (``source``, ``sha256``) and the ``crop`` (left, upper, right, lower) in pixels of that file; an
    annotation has no ``bbox`` and ``area``, which follow from its outline.
    """
    text = Path(__file__).with_name("sample.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def read_photograph(image: Mapping[str, Any]) -> Image.Image:
    """Returns the pixels of one of `sample`'s images, as RGB.

    Raises:
        UserError: scikit-image is not installed, or has another picture under this name.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise UserError(
            "scikit-image, whose photographs these are, is missing: pip install scikit-image"
        )
    path = Path(spec.origin).parent / "data" / image["source"]
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != image["sha256"]:
        raise UserError(
            f"{path} is not the photograph that was annotated: pip install 'scikit-image>=0.22'"
        )
    with Image.open(io.BytesIO(content)) as photograph:
        return photograph.convert("RGB").crop(image["crop"])


def write_sample(folder: Path) -> None:
    """Writes the sample: ``images/*.jpg``, ``annotations/instances_{train,val}.json``.

    Six categories. ``train`` has five photographs with 18 objects; ``val`` has 13 objects on two,
    of which twelve are coins that lie beside those of ``train``, on the other half of a photograph.

    Args:
        folder: Is made; must not exist, or be empty.

    Raises:
        UserError: The folder cannot be made, or scikit-image is missing.
    """
    data = sample()
    with new_folder(folder) as new:
        (new / "images").mkdir()
        for split in SPLITS:
            records, annotations = [], []
            for image in data["images"]:
                if image["split"] != split:
                    continue
                save_jpeg(read_photograph(image), new / "images" / image["file_name"])
                kept = ("id", "file_name", "width", "height", "license")
                records.append({key: image[key] for key in kept})
                annotations += [
                    {**annotation, **_extent(annotation["segmentation"]), "iscrowd": 0}
                    for annotation in data["annotations"]
                    if annotation["image_id"] == image["id"]
                ]
            head = {key: data[key] for key in ("info", "licenses")}
            write_instances(new, split, records, annotations, data["categories"], head)


def write_instances(
    folder: Path,
    split: str,
    images: Iterable[Mapping[str, Any]],
    annotations: Iterable[Mapping[str, Any]],
    categories: Iterable[Mapping[str, Any]],
    head: Mapping[str, Any],
) -> None:
    """Writes ``annotations/instances_{split}.json``; ``head`` goes above the three lists."""
    path = folder / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    content = {
        **head,
        "categories": list(categories),
        "images": list(images),
        "annotations": list(annotations),
    }
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def save_jpeg(image: Image.Image, path: Path) -> None:
    """Saves an image with next to nothing lost."""
    image.save(path, quality=95, subsampling=0)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary neighbour that becomes ``folder`` at the end, or vanishes on an error.

    Raises:
        UserError: There is something at ``folder`` already, or it cannot be written.
    """
    folder = folder.expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: remove it, or name another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {one_line(error)}") from error
    try:
        temporary.chmod(0o755)  # mkdtemp's are for their owner alone
        yield temporary
        temporary.replace(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {one_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _extent(polygons: Iterable[list[float]]) -> dict[str, Any]:
    """Returns ``bbox`` (left, upper, width, height) and ``area`` of polygons apart."""
    area, xs, ys = 0.0, [], []
    for flat in polygons:
        x, y = flat[::2], flat[1::2]
        corners = zip(x, y, x[1:] + x[:1], y[1:] + y[:1], strict=True)
        area += abs(sum(x0 * y1 - x1 * y0 for x0, y0, x1, y1 in corners)) / 2
        xs += x
        ys += y
    left, upper = min(xs), min(ys)
    return {"bbox": [left, upper, max(xs) - left, max(ys) - upper], "area": area}
