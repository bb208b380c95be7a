"""Images that tell which values activations take: what int8 is calibrated on and checked with."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageMode
from timm.data import IterableImageDataset, create_transform
from torch import Tensor

from vitlinear.checkpoints.card import Card
from vitlinear.data.dataset import open_dataset
from vitlinear.data.images import DAMAGE, UnreadableImage, pixels
from vitlinear.data.listing import find_images
from vitlinear.errors import UserError

from .shapes import Shapes

IMAGES = 256  # to calibrate on
HELD_OUT = 8  # others, to check with
Transform = Callable[[Image.Image], Tensor]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Normalised images of a model's own input size, or the size nearest to it that is allowed.

    Attributes:
        images: To take ranges from, [N, C, H, W].
        held_out: Others, to check with, [`HELD_OUT`, C, H, W].
        source: Where they are from, for people.
    """

    images: Tensor
    held_out: Tensor
    source: str

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images in batches of exactly one size: the last takes some of the first again."""
        return _batches(self.images, size)

    def checks(self, size: tuple[int, int, int, int]) -> list[Tensor]:
        """All held-out images in batches [B, C, H, W]: the last takes some of the first again."""
        images = F.interpolate(self.held_out, size[2:], mode="bilinear", antialias=True)
        return list(_batches(images, size[0]))


def _batches(images: Tensor, size: int) -> Iterator[Tensor]:
    count = len(images)
    for start in range(0, count, size):
        yield images[torch.arange(start, start + size) % count]


def read(
    card: Card,
    shapes: Shapes,
    dataset: str | None = None,
    data_dir: str | None = None,
    train_split: str | None = None,
    calibration_images: int = IMAGES,
) -> Calibration:
    """Reads images to calibrate on, drawn at random but always the same; of a stream, the first.

    Args:
        card: What the model is, its input, and the data set if it knows one.
        shapes: Sizes that the program takes.
        dataset: As ``vitlinear train`` takes it; by default the card's, unless there is a folder.
        data_dir: Where the data set lies; without one, any folder with images in it or below.
        train_split: Of the data set; ``'train'`` by default. A folder has none.
        calibration_images: How many to calibrate on, at most.

    Raises:
        UserError: No images are named, or there are too few, or one cannot be read, or images
            have not as many channels as the model takes.
    """
    channels, height, width = card.data_config.input_size
    mode = card.image_mode
    if mode is None or len(ImageMode.getmode(mode).bands) != channels:
        raise UserError(
            f"--dtype int8 needs images to calibrate on, and no mode of images with {channels} "
            "channels is known: take --dtype float16"
        )
    size = channels, shapes.height.nearest(height), shapes.width.nearest(width)
    preprocessing = dataclasses.replace(card.data_config, input_size=size)
    transform = create_transform(**preprocessing.as_dict(), is_training=False)
    total = calibration_images + HELD_OUT
    name = dataset or (None if data_dir else card.dataset)
    if name is not None:
        split = "train" if train_split is None else train_split
        source = f"{name} ({split})"
        images = _of_dataset(name, data_dir, split, mode, transform, total)
    elif train_split is not None:
        raise UserError(
            f"--train-split {train_split} is for --dataset: of a folder, give the one that holds "
            "the images as --data-dir"
        )
    elif data_dir is not None:
        source = data_dir
        images = _of_folder(data_dir, mode, transform, total)
    else:
        raise UserError(
            "--dtype int8 needs images like those it will see, to calibrate on: give --data-dir "
            "FOLDER, or --dataset NAME"
        )
    if len(images) <= HELD_OUT:
        raise UserError(
            f"{source} has {len(images)} images: --dtype int8 calibrates on some hundred, and "
            f"checks with {HELD_OUT} others"
        )
    return Calibration(torch.stack(images[HELD_OUT:]), torch.stack(images[:HELD_OUT]), source)


def _drawn(total: int, count: int) -> list[int]:
    return random.Random(0).sample(range(total), min(count, total))


def _of_dataset(
    name: str, data_dir: str | None, split: str, mode: str, transform: Transform, count: int
) -> list[Tensor]:
    dataset = open_dataset(name, train=True, mode=mode, data_dir=data_dir, split=split)
    dataset.transform = transform
    if isinstance(dataset, IterableImageDataset):
        return [image for image, _ in itertools.islice(dataset, count)]
    return [dataset[index][0] for index in _drawn(len(dataset), count)]


def _of_folder(folder: str, mode: str, transform: Transform, count: int) -> list[Tensor]:
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"--data-dir {folder} is not a folder: give one that holds images")
    files = find_images([folder])
    images = []
    for index in _drawn(len(files), count):
        try:
            images.append(transform(pixels(files[index].read_bytes(), mode)))
        except DAMAGE as error:
            raise UnreadableImage(files[index], error).as_user_error() from error
    return images
