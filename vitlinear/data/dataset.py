"""The data set that ``--dataset`` and ``--data-dir`` mean."""

import os
from argparse import BooleanOptionalAction
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ImageMode
from timm.data import IterableImageDataset

from vitlinear.checkpoints.card import IMAGE_MODES
from vitlinear.cli.flags import NATURAL, file_name
from vitlinear.cli.parser import Parser
from vitlinear.errors import UserError

from .bad_images import BadImages
from .images import decode, upright
from .labelled import LabelledImages, ShardImages, StreamedImages
from .readers import open_other, refuse_keys
from .sources import digits, fashion_mnist

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# PIL modes whose channels are 8 bits of brightness or colour: batches hold bytes.
MODES = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV")
# Names of the two parts of an embedded set.
PARTS = {True: ("train",), False: ("validation", "val", "test")}
ONE_CLASS = (
    "warning: all training images are of one class, from which nothing is learnt, and accuracy is "
    "always 100 %; class folders belong directly below the split"
)


@dataclass(frozen=True)
class DataConfig:
    """A data set of labelled images, and how it is read."""

    dataset: str | None
    data_dir: str | None
    val_split: str
    class_map: str | None
    input_key: str | None
    target_key: str | None
    dataset_download: bool
    input_img_mode: str | None
    workers: int
    pin_mem: bool


def add_data_flags(parser: Parser) -> None:
    """Adds the flags of `DataConfig`."""
    group = parser.group("data")
    group.add_argument(
        "--dataset",
        default=None,
        metavar="NAME",
        help="digits (comes with scikit-learn), fashion_mnist, or any name that timm's "
        "create_dataset takes: torch/cifar10, hfds/..., wds/...; omit it for a folder or tar of "
        "images in --data-dir",
    )
    group.add_argument("--data-dir", default=None, metavar="DIR", help="where the data set lies")
    group.add_argument(
        "--val-split", default="validation", metavar="NAME", help="'' means --data-dir itself"
    )
    group.add_argument(
        "--class-map", type=file_name, default=None, metavar="FILE", help="class name per line"
    )
    group.add_argument("--input-key", default=None, metavar="NAME", help="image, in hfds/ and wds/")
    group.add_argument("--target-key", default=None, metavar="NAME", help="label, likewise")
    group.add_argument(
        "--dataset-download", action=BooleanOptionalAction, default=False, help="fetch torch/ data"
    )
    add_image_mode_flag(parser)
    group.add_argument(
        "-j",
        "--workers",
        type=NATURAL,
        default=min(4, CORES),
        metavar="N",
        help="processes that read images (default: 4, or as many as there are cores)",
    )
    group.add_argument("--pin-mem", action=BooleanOptionalAction, default=False, help="pin memory")


def add_image_mode_flag(parser: Parser) -> None:
    """Adds ``--input-img-mode``, which `image_mode` takes."""
    parser.group("data").add_argument(
        "--input-img-mode", default=None, metavar="MODE", help="PIL mode (default: L or RGB)"
    )


def image_mode(in_chans: int, requested: str | None) -> str:
    """Returns the PIL mode for ``in_chans`` channels.

    Raises:
        UserError: No mode, or not the requested one, has that many channels of 8 bits.
    """
    mode = requested or IMAGE_MODES.get(in_chans)
    if mode is None:
        raise UserError(
            f"no default image mode has {in_chans} channels: use --in-chans 1 or 3, "
            "or name one with --input-img-mode (RGBA has 4)"
        )
    if mode not in MODES:
        raise UserError(
            f"unknown --input-img-mode {mode}: models take channels of 8 bits, {', '.join(MODES)}"
        )
    bands = len(ImageMode.getmode(mode).bands)
    if bands != in_chans:
        raise UserError(f"--input-img-mode {mode} has {bands} channels, the model {in_chans}")
    return mode


def open_source(
    name: str | None,
    *,
    train: bool,
    mode: str,
    data_dir: str | None = None,
    split: str | None = None,
    **options: Any,
) -> Any:
    """Opens one split, undecoded.

    Args:
        name: ``digits``, ``fashion_mnist``, a name for timm's ``create_dataset``, or None.
        train: The training or the held-out part (of the two embedded sets).
        mode: PIL mode, for what timm itself decodes.
        data_dir: Where the files are.
        split: Split name; of the two embedded sets one of `PARTS`.
        **options: More arguments of ``create_dataset``.

    Returns:
        A `Source`, a `ShardReader`, or timm's own iterable data set.

    Raises:
        UserError: There is no such data set, or it has no such split.
    """
    path = Path(data_dir).expanduser() if data_dir else None
    options = {key: value for key, value in options.items() if value is not None}
    refuse_keys(name or "--data-dir", options)
    if name in ("digits", "fashion_mnist"):
        if split is not None and split not in PARTS[train]:
            flag = "--train-split" if train else "--val-split"
            raise UserError(
                f"{flag} {split}: {name} has one part to train on and one held out; leave {flag} "
                "out"
            )
        return digits(train) if name == "digits" else fashion_mnist(train, path)
    if split is None:
        split = "train" if train else "validation"
    options = {"is_training": train} | options
    return open_other(name or "", path, split, mode, train=train, **options)


def open_dataset(
    name: str | None,
    *,
    train: bool,
    mode: str,
    num_classes: int | None = None,
    bad_images: BadImages | None = None,
    **options: Any,
) -> Any:
    """Opens one split to train on or to evaluate on.

    Args:
        name: As for `open_source`.
        train: The training or the held-out part.
        mode: PIL mode that images are converted to.
        num_classes: Bound of the labels where the data does not name its classes.
        bad_images: What becomes of unreadable images; by default, errors.
        **options: Further arguments of `open_source`.

    Returns:
        A `LabelledImages`, or an iterable data set of timm's kind.
    """
    bad_images = bad_images or BadImages()
    found = open_source(name, train=train, mode=mode, **options)
    if isinstance(found, IterableImageDataset):
        return StreamedImages(found, name or "", mode, bad_images)
    kind = LabelledImages if hasattr(found, "read") else ShardImages
    return kind(found, mode, train, bad_images, num_classes)


def open_split(
    data: DataConfig,
    split: str,
    *,
    train: bool,
    mode: str,
    batch_size: int,
    num_classes: int | None = None,
    seed: int | None = None,
    bad_images: BadImages | None = None,
) -> Any:
    """Opens a split of a configured data set, to train on or to evaluate on.

    Args:
        data: The data set.
        split: Name of the split.
        train: As for `open_dataset`, like ``mode``, ``num_classes`` and ``bad_images``.
        mode: PIL mode.
        batch_size: Images in a batch of this process: streams are divided by it.
        num_classes: Bound of the labels.
        seed: Of the order in which a stream is read; by default timm's.
        bad_images: What becomes of unreadable images.
    """
    return open_dataset(
        data.dataset,
        train=train,
        mode=mode,
        num_classes=num_classes,
        bad_images=bad_images,
        batch_size=batch_size,
        seed=seed,
        **source_options(data, split),
    )


def data_notes(train_set: Any, eval_set: Any, num_classes: int) -> list[str]:
    """Returns lines for the user about the data of a run: what was left out, and a lone class."""
    notes = [*getattr(train_set, "notes", ()), *getattr(eval_set, "notes", ())]
    used = getattr(getattr(train_set, "source", None), "used_labels", None)
    if num_classes == 1 or (used is not None and len(used) == 1):
        notes.append(ONE_CLASS)
    return notes


def source_options(data: DataConfig, split: str) -> dict[str, Any]:
    """Returns the arguments of `open_source` that open a split of a configured data set."""
    return {
        "data_dir": data.data_dir,
        "split": split,
        "class_map": data.class_map,
        "download": data.dataset_download,
        "input_key": data.input_key,
        "target_key": data.target_key,
    }


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
    content, label = dataset.source.read(index)
    image = upright(decode(content))
    image.save(path)
    return dataset.classes[label] if dataset.classes else str(label)
