"""The data set that ``--dataset`` and ``--data-dir`` mean."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageMode
from timm.data import IterableImageDataset
from torch.utils.data import Dataset

from vitlinear.errors import UserError
from vitlinear.train import sources


class LabelledImages(Dataset):
    """A `Source` in one PIL mode, with the ``transform`` attribute that timm's loaders set."""

    transform: Callable[[Image.Image], Any] | None = None

    def __init__(self, source: sources.Source, image_mode: str) -> None:
        self.source, self.image_mode = source, image_mode
        names = getattr(source, "classes", None)
        self.classes: list[str] | None = None if names is None else [str(name) for name in names]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.source[index]
        image = image.convert(self.image_mode)
        return (self.transform(image) if self.transform else image), label


def image_mode(in_chans: int, requested: str | None) -> str:
    """Returns the PIL mode for ``in_chans`` channels.

    Raises:
        UserError: No mode, or not the requested one, has that many channels.
    """
    mode = requested or {1: "L", 3: "RGB"}.get(in_chans)
    if mode is None:
        raise UserError(
            f"no default image mode has {in_chans} channels: use --in-chans 1 or 3, "
            "or name one with --input-img-mode (RGBA has 4)"
        )
    try:
        bands = len(ImageMode.getmode(mode).bands)
    except KeyError as error:
        raise UserError(f"unknown --input-img-mode {mode}; L, RGB or RGBA, say") from error
    if bands != in_chans:
        raise UserError(f"--input-img-mode {mode} has {bands} channels, the model {in_chans}")
    return mode


def open_dataset(
    name: str | None,
    *,
    train: bool,
    mode: str,
    data_dir: str | None = None,
    split: str | None = None,
    **options: Any,
) -> Any:
    """Opens one split.

    Args:
        name: ``digits``, ``fashion_mnist``, a name for timm's ``create_dataset``, or None.
        train: The training or the held-out part (of the two embedded sets).
        mode: PIL mode that images are converted to.
        data_dir: Where the files are.
        split: Split name for everything but the two embedded sets.
        **options: More arguments of ``create_dataset``.

    Returns:
        A `LabelledImages`, or timm's iterable dataset.
    """
    path = Path(data_dir).expanduser() if data_dir else None
    if name == "digits":
        return LabelledImages(sources.digits(train), mode)
    if name == "fashion_mnist":
        return LabelledImages(sources.fashion_mnist(train, path), mode)
    if split is None:
        split = "train" if train else "validation"
    options = {key: value for key, value in options.items() if value is not None}
    found = sources.folder_or_other(name or "", path, split, mode, is_training=train, **options)
    if isinstance(found, IterableImageDataset):
        return found
    return LabelledImages(found, mode)


def open_from_arguments(args: argparse.Namespace, train: bool, mode: str) -> Any:
    """Opens the split that parsed flags mean."""
    return open_dataset(
        args.dataset,
        train=train,
        mode=mode,
        data_dir=args.data_dir,
        split=args.train_split if train else args.val_split,
        class_map=args.class_map,
        download=args.dataset_download,
        batch_size=args.batch_size,
    )


def class_names(dataset: Any) -> list[str] | None:
    """Returns the class names in label order, or None where the data does not say."""
    return getattr(dataset, "classes", None)


def export_sample(
    name: str, index: int, path: str | Path, *, train: bool = False, data_dir: str | None = None
) -> str:
    """Writes one image of a data set to a file.

    Args:
        name: ``digits``, ``fashion_mnist`` or a timm name.
        index: Position in the split.
        path: Where to write; the suffix gives the format.
        train: From the training part; by default from the held-out part.
        data_dir: Where the data set lies.

    Returns:
        The name of the image's class.
    """
    dataset = open_dataset(name, train=train, mode="RGB", data_dir=data_dir)
    if not 0 <= index < len(dataset):
        raise UserError(f"{name} has no image {index}: it holds {len(dataset)}")
    image, label = dataset.source[index]
    image.save(path)
    return dataset.classes[label] if dataset.classes else str(label)


def check_same_classes(
    expected: Sequence[str] | None, found: Sequence[str] | None, first: str, second: str
) -> None:
    """Raises `UserError` if two lists of class names, where both are known, differ."""
    if expected is None or found is None or list(expected) == list(found):
        return
    if len(expected) != len(found):
        raise UserError(
            f"{first} has {len(expected)} classes, {second} {len(found)}: "
            f"{_difference(expected, found)}"
        )
    raise UserError(f"the classes of {first} and {second} differ: {_difference(expected, found)}")


def _difference(expected: Sequence[str], found: Sequence[str]) -> str:
    odd = sorted(set(expected) ^ set(found))[:3]
    return f"not in both: {', '.join(odd)}" if odd else "same names in another order"
