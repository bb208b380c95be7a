"""Data sets that timm's readers open: folders, tars, torchvision's, Hugging Face's, shards."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import IterableImageDataset, create_dataset
from torchvision.datasets import DatasetFolder

from vitlinear.errors import UserError, one_line, pip_install

from .class_folders import ClassFolders, ClassTar, find_split, split_in
from .class_names import names_in_order, read_class_map
from .listing import entries_of, is_folder
from .sources import OPENING, Source

# What each prefix needs besides what vitlinear itself does: module, how to install it.
PACKAGES = {
    "wds": ("webdataset", pip_install("data")),
    "hfds": ("datasets", pip_install("data")),
    "hfids": ("datasets", pip_install("data")),
    "tfds": ("tensorflow", "pip install tensorflow tensorflow-datasets"),
}
# Prefixes of data sets that their libraries fetch.
DOWNLOADED = ("torch", "hfds", "hfids", "tfds")


class ReaderSource:
    """A timm reader with random access: hfds."""

    def __init__(self, reader: Any, classes: Sequence[str] | None) -> None:
        self.reader, self.classes = reader, classes

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> tuple[bytes, int]:
        """Content of the file, and label."""
        try:
            file, label = self.reader[index][:2]
        except (TypeError, AssertionError) as error:
            if not hasattr(self.reader, "image_key"):  # only columns can hold nothing
                raise
            raise ValueError("no image is stored here") from error
        except KeyError as error:
            raise UserError(f"{self.name(index)}: --class-map has no class {error}") from error
        with file:
            content = file.read()
        try:
            return content, int(label)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self.name(index)} has the label {label!r}, which is no class number: give the "
                "classes with --class-map, or another --target-key"
            ) from error

    def name(self, index: int) -> str:
        """Path, or number where images have none."""
        try:
            path = self.reader.filename(index, absolute=True)
        except TypeError:  # no image
            path = None
        return str(path or f"number {index}")


class TorchvisionSource:
    """A torchvision data set of (image, label)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        names = getattr(dataset, "classes", None)
        # ImageNet's are tuples of synonyms.
        self.classes: Sequence[str] | None = names and [
            name if isinstance(name, str) else name[0] for name in names
        ]

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[bytes | Image.Image, int]:
        """Content of the file, or image where there are no files, and label."""
        if isinstance(self.dataset, DatasetFolder):
            path, label = self.dataset.samples[index]
            return Path(path).read_bytes(), int(label)
        image, label = self.dataset[index]
        return image, int(label)

    def name(self, index: int) -> str:
        """Path, or number where there are no files."""
        if isinstance(self.dataset, DatasetFolder):
            return str(self.dataset.samples[index][0])
        return f"{type(self.dataset).__name__} number {index}"


def refuse_keys(name: str, options: dict[str, Any]) -> None:
    """Raises `UserError` for flags that a kind of data set would not heed."""
    prefix = name.partition("/")[0].lower() if "/" in name else ""
    for key in ("input_key", "target_key", "class_map"):
        heeded = prefix in PACKAGES or (key == "class_map" and name == "--data-dir")
        if options.get(key) and not heeded:
            flag = f"--{key.replace('_', '-')}"
            raise UserError(f"{flag} means nothing for {name}: leave it out")
    if options.get("download") and prefix not in DOWNLOADED:
        raise UserError(f"--dataset-download means nothing for {name}: leave it out")


def open_other(
    name: str, data_dir: Path | None, split: str, image_mode: str, *, train: bool, **options: Any
) -> Any:
    """Opens anything that timm's ``create_dataset`` knows.

    Args:
        name: timm's data set name; empty for a folder or tar.
        data_dir: Root folder, or a tar file.
        split: Name of the split; for folders, of a sub-folder (with timm's synonyms).
        image_mode: PIL mode for tfds; others convert later.
        train: Whether it is the training part: errors name its flag.
        **options: Passed on to ``create_dataset``.

    Returns:
        A `Source`, a `ShardReader`, or timm's own iterable data set.
    """
    prefix = name.partition("/")[0].lower() if "/" in name else ""
    if not prefix:
        return _open_files(name, data_dir, split, options)
    if data_dir is not None and not data_dir.exists() and not options.get("download"):
        raise UserError(f"data folder {data_dir} does not exist")
    if prefix in ("torch", "wds") and data_dir is None:
        raise UserError(f"data set {name} needs its folder: --dataset {name} --data-dir FOLDER")
    module, install = PACKAGES.get(prefix, ("torchvision", "pip install torchvision"))
    if importlib.util.find_spec(module) is None:
        raise UserError(f"data set {name} needs the package {module}: {install}")
    flag = "--train-split" if train else "--val-split"
    if prefix == "torch":  # hands what it does not know to torchvision, which refuses it
        options = {key: value for key, value in options.items() if key == "download"}
    elif prefix not in PACKAGES:
        raise UserError(f"unknown data set '{name}': timm knows torch/, {'/, '.join(PACKAGES)}/")
    root = str(data_dir) if data_dir else None
    try:
        if prefix == "wds":
            from .shards import ShardReader  # imports webdataset

            return ShardReader.open(root or "", split, options)
        if options.get("class_map"):
            options["class_map"] = read_class_map(options["class_map"], root or "")
        # hfids hands on images as they are, for `images.pixels`; tfds needs to know the mode.
        mode = "" if prefix == "hfids" else image_mode
        dataset = create_dataset(name, root=root, split=split, input_img_mode=mode, **options)
    except OPENING as error:
        where = f"{name} in {root}" if root else name
        reason = one_line(error).replace("download=True", "--dataset-download")  # torchvision's
        if prefix == "torch" and split and data_dir is not None and _has_classes(data_dir, split):
            reason = f"{reason.rstrip('.')}. To read the folders there, leave --dataset {name} out."
        raise UserError(f"cannot open data set {where} ({flag} {split}): {reason}") from error
    if isinstance(dataset, IterableImageDataset):
        return dataset
    reader = getattr(dataset, "reader", None)
    if reader is None:
        return TorchvisionSource(dataset)
    _check_columns(reader, name)
    return ReaderSource(reader, _class_names(reader))


def _has_classes(root: Path, split: str) -> bool:
    """Whether the folder of a split is there and holds folders, as those of classes."""
    path = split_in(root, split)
    if path is None or not path.is_dir():
        return False
    return any(is_folder(entry) and entry.name[0] != "." for entry in entries_of(str(path)))


def _check_columns(reader: Any, name: str) -> None:
    """Raises `UserError` if a Hugging Face data set lacks the column of images or of labels."""
    table = reader.dataset.data
    found = [key for key in table.column_names if table.column(key).null_count < len(table)]
    # timm's reader adds the column of images, empty, where there is none
    for flag, keys in (("--input-key", reader.image_key), ("--target-key", reader.label_key)):
        for key in keys.split(","):
            if key.partition(".")[0] not in found:
                raise UserError(
                    f"{name} has no column '{key}', only {', '.join(found)}: name it by {flag}"
                )


def _open_files(name: str, data_dir: Path | None, split: str, options: dict[str, Any]) -> Source:
    if name:
        raise UserError(
            f"unknown data set '{name}'; use digits, fashion_mnist, a timm name with a prefix "
            "such as torch/cifar10, or --data-dir FOLDER alone"
        )
    if data_dir is None:
        raise UserError("no data: give --dataset NAME or --data-dir FOLDER")
    if not data_dir.exists():
        raise UserError(f"data folder {data_dir} does not exist")
    if data_dir.is_file() and options.get("is_training"):
        raise UserError(
            f"{data_dir} holds one split, training needs two: give the folder of train.tar "
            "and val.tar, or of train/ and val/"
        )
    part = find_split(data_dir, split)
    try:
        return (ClassFolders if part.is_dir() else ClassTar)(part, options.get("class_map"))
    except OPENING as error:
        raise UserError(f"cannot open {part}: {one_line(error)}") from error


def _class_names(reader: Any) -> list[str] | None:
    return names_in_order(getattr(reader, "class_to_idx", None))
