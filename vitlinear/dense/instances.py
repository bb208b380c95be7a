"""Annotations in COCO's format, counted and compared with the classes of a detector.

What counts as an object, and which number its class gets, are mmdet's rules: classes are numbered
in the order of the file's categories, whatever the order of the names that a config gives.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitlinear.errors import UserError, did_you_mean, one_line


@dataclass
class Instances:
    """Annotations of a file, counted.

    Attributes:
        images: Number of images.
        categories: Names, in the order of the file.
        boxes: Boxes that mmdet learns and scores, for each name.
        outlines: How many of those have an outline.
        crowds: Boxes of crowds, for each name: they neither count nor harm.
        left_out: Number of annotations that mmdet leaves out, and the first of them, by reason.
    """

    images: int
    categories: list[str]
    boxes: dict[str, int] = field(default_factory=dict)
    outlines: int = 0
    crowds: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)


def count_instances(path: Path) -> Instances:
    """Count what a file in COCO's format holds.

    Raises:
        UserError: It cannot be read, or an entry lacks what mmdet asks of it.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {one_line(error)[:200]}") from error
    try:
        names = {item["id"]: str(item["name"]) for item in content["categories"]}
        sizes = {item["id"]: (item["width"], item["height"]) for item in content["images"]}
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not in COCO's format: each of its categories needs id and name, each of "
            f"its images id, width and height ({one_line(error)} is missing)"
        ) from error
    if len(names) < len(content["categories"]):
        raise UserError(f"{path} has two categories of one id")
    boxes, crowds = Counter[str](), Counter[str]()
    found = Instances(len(sizes), list(names.values()))
    reasons: dict[str, list[str]] = {}
    for annotation in content.get("annotations") or ():
        try:
            name, reason = _judge(annotation, names, sizes)
        except (KeyError, TypeError, ValueError) as error:
            what = f"has no {one_line(error)}" if isinstance(error, KeyError) else one_line(error)
            raise UserError(f"{path}: annotation {annotation}: {what}"[:300]) from error
        if reason:
            reasons.setdefault(reason, []).append(f"id {annotation.get('id')}")
        elif annotation.get("iscrowd"):
            crowds[name] += 1
        else:
            boxes[name] += 1
            found.outlines += bool(annotation.get("segmentation"))
    found.boxes, found.crowds = dict(boxes), dict(crowds)
    found.left_out = {reason: (len(ids), ids[0]) for reason, ids in reasons.items()}
    return found


def _judge(
    annotation: Mapping[str, Any], names: Mapping[Any, str], sizes: Mapping[Any, tuple[int, int]]
) -> tuple[str, str]:
    """The name of an annotation's category, and why mmdet leaves it out; empty if it does not."""
    category = annotation["category_id"]
    if category not in names:
        raise ValueError(f"category_id {category} is none of the file's categories")
    name = names[category]
    left, upper, width, height = (float(value) for value in annotation["bbox"])
    if not all(abs(value) < float("inf") for value in (left, upper, width, height)):
        raise ValueError(f"the box {annotation['bbox']} is not finite")
    if annotation["image_id"] not in sizes:
        return name, "of images that the file does not list"
    if annotation.get("ignore", False):
        return name, "marked to be ignored"
    if annotation["area"] <= 0 or width < 1 or height < 1:
        return name, "without an area, or less than a pixel wide or high"
    columns, rows = sizes[annotation["image_id"]]
    inside = min(left + width, columns) > max(left, 0) and min(upper + height, rows) > max(upper, 0)
    return name, "" if inside else "outside of their image"


def check_categories(
    categories: Sequence[str], classes: Sequence[str], path: Path, key: str
) -> None:
    """Refuse names of a config that mmdet would give to other categories of the file.

    Args:
        categories: In the order of the file.
        classes: As the config has them.
        path: The file.
        key: Where the config has them.

    Raises:
        UserError: A name is not in the file, or the order is another one.
    """
    for name in classes:
        if name not in categories:
            raise UserError(
                f"{key} names the class {name!r}, which {path} does not have"
                f"{did_you_mean(name, categories)}: its categories are {_listed(categories)}"
            )
    chosen = [name for name in categories if name in classes]
    if chosen != list(classes):
        raise UserError(
            f"{key} has the classes in another order than {path}, or a name twice, so that mmdet "
            f"would mix them up: write {_tuple(chosen)}"
        )


def check_instances(
    found: Instances, classes: Sequence[str], path: Path, key: str, outlines: bool = False
) -> str:
    """Compare annotations with the classes of a detector.

    Args:
        found: The annotations, counted.
        classes: Names that the config gives the classes.
        path: The file of the annotations.
        key: Where the config has the names.
        outlines: Whether the detector learns masks.

    Returns:
        A line that says how much there is of each class, and what is left out.

    Raises:
        UserError: As `check_categories`; or there is no box of any class, or no outline.
    """
    check_categories(found.categories, classes, path, key)
    left_out = dict(found.left_out)
    others = [name for name in found.categories if name not in classes and found.boxes.get(name)]
    if others:
        count = sum(found.boxes[name] for name in others)
        left_out[f"of categories that {key} leaves out"] = (count, _listed(others))
    said = "".join(
        f"; left out: {count} {reason} ({first})" for reason, (count, first) in left_out.items()
    )
    counts = {name: found.boxes.get(name, 0) for name in classes}
    if not any(counts.values()):
        raise UserError(f"{path} has no box of any class to learn or to score{said}")
    if outlines and not found.outlines:
        raise UserError(
            f"{path} has no outlines, which the masks of the model are learned from: its boxes "
            "need segmentation"
        )
    if crowds := sum(found.crowds.get(name, 0) for name in classes):
        said = f"; {crowds} of crowds{said}"
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"{path}: {found.images} images, {sum(counts.values())} boxes: {listed}{said}"


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def _tuple(names: Sequence[str], most: int = 80) -> str:
    return repr(tuple(names)) if len(names) <= most else "them in the order of the file"
