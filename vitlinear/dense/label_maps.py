"""Label maps of semantic segmentation, counted and compared with the classes of a segmentor.

What a value stands for are mmseg's rules: the value n is class n, or with ``reduce_zero_label``
class n - 1, and 0 nothing. 255 counts nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vitlinear.data.images import DAMAGE, UnreadableImage, orientation
from vitlinear.errors import UserError, one_line

IGNORED = 255


@dataclass
class LabelMaps:
    """Label maps, counted.

    Attributes:
        maps: Number of maps.
        pixels: Pixels of each value.
        example: A map that has the value.
    """

    maps: int
    pixels: dict[int, int] = field(default_factory=dict)
    example: dict[int, str] = field(default_factory=dict)


def count_labels(
    pairs: Sequence[tuple[str, str]], decode: Callable[[bytes], np.ndarray]
) -> LabelMaps:
    """Count the values of label maps, all of their pixels.

    Args:
        pairs: Paths of each image and of its map.
        decode: Makes [H, W] of the content of a file of a map.

    Raises:
        UserError: A file is missing or damaged, is no map of one value a pixel from 0 to 255, or
            has another size than its image.
    """
    found = LabelMaps(len(pairs))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        counted = pool.map(lambda pair: _count(*pair, decode), pairs)
        for (_, path), counts in zip(
            pairs, tqdm(counted, "label maps", len(pairs), leave=False, disable=None), strict=True
        ):
            for value in np.flatnonzero(counts).tolist():
                found.pixels[value] = found.pixels.get(value, 0) + int(counts[value])
                found.example.setdefault(value, path)
    return found


def _count(image: str, path: str, decode: Callable[[bytes], np.ndarray]) -> np.ndarray:
    try:
        labels = np.asarray(decode(Path(path).read_bytes()))
    except FileNotFoundError as error:
        raise UserError(f"image {image} has no label map: {path} does not exist") from error
    except DAMAGE as error:
        raise UnreadableImage(path, error).as_user_error("replace it") from error
    if labels.ndim == 3 and labels.shape[2] == 1:
        labels = labels[..., 0]
    if labels.ndim != 2:
        raise UserError(
            f"label map {path} has {labels.shape[-1]} channels, where it needs one value a pixel: "
            "write the number of the class, in mode L or P"
        )
    lowest, highest = labels.min(), labels.max()
    if lowest < 0 or highest > IGNORED or labels.dtype.kind not in "bui":
        value = highest if highest > IGNORED or labels.dtype.kind not in "bui" else lowest
        raise UserError(f"label map {path} has the value {value}: mmseg reads 0 to 255, whole")
    size = _upright_size(image)
    if size != labels.shape[::-1]:
        columns, rows = labels.shape[::-1]
        raise UserError(
            f"label map {path} is {columns} x {rows} pixels, its image {image} {size[0]} x "
            f"{size[1]}: they must be the same"
        )
    return np.bincount(labels.astype(np.uint8).ravel(), minlength=IGNORED + 1)


def _upright_size(path: str) -> tuple[int, int]:
    """Width and height of an image as readers of photographs turn it."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = orientation(image) >= 5  # rows are columns
    except FileNotFoundError as error:
        raise UserError(f"image {path} does not exist") from error
    except DAMAGE as error:
        raise UserError(f"cannot read image {path}: {one_line(error)}; replace it") from error
    return (height, width) if turned else (width, height)


def check_labels(
    found: LabelMaps,
    classes: Sequence[str],
    key: str,
    reduce_zero_label: bool = False,
    label_map: Mapping[int, int] | None = None,
    train: bool = True,
) -> str:
    """Compare label maps with the classes of a segmentor.

    Args:
        found: The maps, counted.
        classes: Names that the config gives the classes.
        key: Where the config has the data set.
        reduce_zero_label: Whether the config says so.
        label_map: Number of a class by its number in the data set, where a config has chosen some.
        train: Whether the maps are trained on; held-out ones may have a single class, if no pixel
            is 255.

    Returns:
        A line that says how much there is of each class.

    Raises:
        UserError: A value stands for no class, or all that counts is one class.
    """
    pixels = dict.fromkeys(range(len(classes)), 0)
    ignored = 0
    for value, count in sorted(found.pixels.items()):
        label = value
        if reduce_zero_label:
            label = IGNORED if value in (0, IGNORED) else value - 1
        label = (label_map or {}).get(label, label)
        if label == IGNORED:
            ignored += count
        elif label in pixels:
            pixels[label] += count
        else:
            first, last = int(reduce_zero_label), len(classes) - 1 + int(reduce_zero_label)
            zero = "0 and 255 count" if reduce_zero_label else "255 counts"
            raise UserError(
                f"label map {found.example[value]} has the value {value}, which is no class: "
                f"{key} has {len(classes)} classes, the values {first} to {last}; {zero} nowhere"
            )
    present = [label for label, count in pixels.items() if count]
    if len(present) < 2 <= len(classes) and (train or not present or IGNORED in found.pixels):
        values = ", ".join(map(str, sorted(found.pixels)))
        one = f"class {classes[present[0]]!r}" if present else "no class"
        advice = "with reduce_zero_label=True 0 counts nowhere" if reduce_zero_label else ""
        raise UserError(
            f"all {found.maps} label maps of {key} have only {one}, with values {values}: "
            f"{advice or '255 counts nowhere'}; write the numbers of the classes"
        )
    total = sum(found.pixels.values())
    listed = ", ".join(f"{classes[label]} {pixels[label] / total:.2%}" for label in pixels)
    return f"{key}: {found.maps} label maps: {listed}; counts nowhere: {ignored / total:.2%}"
