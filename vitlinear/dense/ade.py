"""The photographs of `vitlinear.detection.coco` in the layout of ADE20K, outlines as label maps."""

from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw

from .coco import new_folder, read_photograph, sample, save_jpeg

FOLDERS = {"train": "training", "val": "validation"}
# Pixels on both sides of an outline that are nobody's: outlines are no better than that.
BAND = 2


def classes() -> tuple[str, ...]:
    """Returns class names in the order of what a network trained on the sample puts out."""
    return ("background", *(category["name"] for category in sample()["categories"]))


def write_sample(folder: Path) -> None:
    """Writes ``{images,annotations}/{training,validation}``, JPEG and PNG, and ``LICENSE.txt``.

    A label map is one byte per pixel in ADE20K's convention, which readers undo with
    ``reduce_zero_label``: 0 is ignored in training and testing, and n is class n - 1 of `classes`.
    Everything that no outline holds is ``background``, 1.

    Args:
        folder: Is made; must not exist, or be empty.

    Raises:
        UserError: The folder cannot be made, or scikit-image is missing.
    """
    data = sample()
    with new_folder(folder) as new:
        for image in data["images"]:
            split = FOLDERS[image["split"]]
            for kind in ("images", "annotations"):
                (new / kind / split).mkdir(parents=True, exist_ok=True)
            save_jpeg(read_photograph(image), new / "images" / split / image["file_name"])
            objects = [
                (annotation["category_id"] + 1, annotation["segmentation"])
                for annotation in data["annotations"]
                if annotation["image_id"] == image["id"]
            ]
            label_map = draw_label_map((image["width"], image["height"]), objects)
            label_map.save(new / "annotations" / split / f"{Path(image['file_name']).stem}.png")
        info = data["info"]
        names = {item["id"]: f"{item['name']}, {item['url']}" for item in data["licenses"]}
        lines = [f"{image['file_name']}: {names[image['license']]}" for image in data["images"]]
        outlines = f"annotations: {info['annotation_license']}, {info['contributor']}"
        (new / "LICENSE.txt").write_text("\n".join([*lines, outlines, ""]), encoding="utf-8")


def draw_label_map(
    size: tuple[int, int], objects: Iterable[tuple[int, Iterable[list[float]]]]
) -> Image.Image:
    """Returns a label map of mode L.

    Args:
        size: Width and height, in pixels.
        objects: Label and polygons (x, y, x, y...) of each; later ones lie over earlier ones.
    """
    label_map = Image.new("L", size, 1)
    draw = ImageDraw.Draw(label_map)
    polygons = [(label, polygon) for label, parts in objects for polygon in parts]
    for label, polygon in polygons:
        draw.polygon(polygon, fill=label)
    for _, polygon in polygons:
        draw.line([*polygon, *polygon[:2]], fill=0, width=2 * BAND, joint="curve")
    return label_map
