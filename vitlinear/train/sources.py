"""Where labelled images come from: sequences of (PIL image, label), plus class names.

``digits`` and ``fashion_mnist`` are here; folders, tars and everything else are timm's readers.
"""

import gzip
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.data import create_dataset, get_img_extensions

from vitlinear.errors import UserError, one_line

TRAIN_NAMES = ("train", "training")
FASHION_MNIST_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


class Source(Protocol):
    """A sequence of images and labels; ``classes`` is None where the data does not say."""

    classes: Sequence[str] | None

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image and label."""


class ArraySource:
    """Images held in memory as one array.

    Args:
        images: ``[N, H, W]``, uint8.
        labels: ``[N]``, integers.
        classes: Class names in label order.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
        self.images, self.labels = images, labels
        self.classes: Sequence[str] | None = classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


class ReaderSource:
    """A timm reader (folder, tar, hfds), with errors that name the file.

    timm's own dataset skips an unreadable image and returns its neighbour; a training set that
    shrinks in silence is not what anyone asked for.
    """

    def __init__(self, reader: Any, classes: Sequence[str] | None) -> None:
        self.reader, self.classes = reader, classes

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            file, label = self.reader[index][:2]
            with file:
                image = Image.open(file)
                image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            name = self.reader.filename(index, absolute=True)
            raise unreadable_image(name, error) from error
        return image, int(label)


def unreadable_image(name: str | Path, error: Exception) -> UserError:
    """Returns the error for an image file that PIL refuses."""
    if isinstance(error, Image.UnidentifiedImageError):
        return UserError(f"cannot read {name}: not an image; replace or remove it")
    return UserError(f"cannot read image {name}: {error}; replace or remove it")


def digits(train: bool) -> ArraySource:
    """The 1797 hand-written 8x8 digits that scikit-learn carries (grey levels 0..16, here 0..255).

    The held-out set is a fifth of each class, 359 in all; drawn with numpy's `RandomState(0)`,
    whose stream numpy has frozen, so that it is the same images on every machine.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the digits data set comes with scikit-learn: pip install 'vitlinear[train]'"
        ) from error
    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target
    random = np.random.RandomState(0)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        members = random.permutation(np.flatnonzero(labels == label))
        held_out[members[: round(len(members) / 5)]] = True
    keep = ~held_out if train else held_out
    return ArraySource(images[keep], labels[keep], [str(label) for label in range(10)])


def fashion_mnist(train: bool, data_dir: Path | None) -> ArraySource:
    """Fashion-MNIST from its four IDX files, plain or gzipped.

    Args:
        train: The 60,000 training images, or else the 10,000 test images.
        data_dir: Folder that holds the files, or torchvision's ``FashionMNIST/raw`` above them;
            by default, where Debian's package dataset-fashion-mnist puts them.
    """
    prefix = "train" if train else "t10k"
    roots = [data_dir / "FashionMNIST" / "raw", data_dir] if data_dir else [FASHION_MNIST_DEBIAN]
    images, labels = (
        _read_idx(_find_idx(roots, f"{prefix}-{name}"))
        for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise UserError(
            f"the Fashion-MNIST files in {roots[-1]} disagree: images {images.shape}, "
            f"labels {labels.shape}; fetch them again"
        )
    return ArraySource(images, labels, FASHION_MNIST_CLASSES)


def _find_idx(roots: list[Path], name: str) -> Path:
    for root in roots:
        for path in (root / name, root / f"{name}.gz"):
            if path.is_file():
                return path
    raise UserError(
        f"Fashion-MNIST not found: no {name}[.gz] in {' or '.join(map(str, roots))}; "
        "apt install dataset-fashion-mnist, or give --data-dir"
    )


def _read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of bytes: 0, 0, type 8, rank, sizes (big-endian uint32), then the data."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; fetch it again") from error
    rank = raw[3] if raw[:3] == b"\0\0\x08" and len(raw) > 3 else 0
    shape = tuple(np.frombuffer(raw, ">u4", rank, 4)) if rank and len(raw) >= 4 + 4 * rank else ()
    if not shape or len(raw) != 4 + 4 * rank + int(np.prod(shape)):
        raise UserError(f"{path} is truncated or not an IDX file; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def folder_or_other(
    name: str, data_dir: Path | None, split: str, image_mode: str, **options: Any
) -> Any:
    """Opens anything else that timm's ``create_dataset`` knows.

    Args:
        name: timm's data set name; empty for a folder or tar.
        data_dir: Root folder, or a tar file.
        split: Name of the split; for folders, of a sub-folder (with timm's synonyms).
        image_mode: PIL mode for iterable data sets; the others convert later.
        **options: Passed on to ``create_dataset``.

    Returns:
        A `Source`, or timm's dataset itself where that is iterable.
    """
    prefix = name.partition("/")[0].lower() if "/" in name else ""
    if not prefix:
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
        part = _find_split(data_dir, split) if data_dir.is_dir() else data_dir
        return _open_folder_or_tar(part, options)
    root = str(data_dir) if data_dir else None
    if prefix == "torch" and root is None:
        raise UserError(f"data set {name} needs --data-dir, the folder it lies in")
    try:
        dataset = create_dataset(name, root=root, split=split, input_img_mode=image_mode, **options)
    except ImportError as error:
        raise UserError(
            f"data set {name} needs a package that is missing: pip install {error.name}"
        ) from error
    except (AssertionError, RuntimeError, ValueError, OSError) as error:
        reason = one_line(error)
        raise UserError(f"cannot open data set {name or root} ({split}): {reason}") from error
    reader = getattr(dataset, "reader", None)
    if reader is None:  # torchvision's own class: already yields (PIL image, label)
        return dataset
    if not hasattr(reader, "__getitem__"):
        return dataset
    return ReaderSource(reader, _class_names(reader))


def _find_split(root: Path, split: str) -> Path:
    """Finds the sub-folder or tar of a split, by its name or a synonym that timm knows too."""
    if not split:  # a folder of class folders, as ``--val-split ''`` says
        return root
    synonyms = ("validation", "val", "valid", "eval", "evaluation")
    for group in (TRAIN_NAMES, synonyms):
        names = (split, *group) if split in group else (split,)
        for name in names:
            for path in (root / name, root / f"{name}.tar"):
                if path.exists():
                    return path
    wanted = "train" if split in TRAIN_NAMES else split
    raise UserError(
        f"no '{wanted}' folder in {root}: images belong in {root}/train/CLASS/ and "
        f"{root}/val/CLASS/"
    )


def _open_folder_or_tar(root: Path, options: dict[str, Any]) -> ReaderSource:
    if root.is_dir():
        _check_class_folders(root)
    try:
        dataset = create_dataset("", root=str(root), search_split=False, **options)
    except (AssertionError, RuntimeError, OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"cannot open {root}: {one_line(error)}") from error
    return ReaderSource(dataset.reader, _class_names(dataset.reader))


def _check_class_folders(root: Path) -> None:
    """Names a class folder without images, which timm would take for no class at all."""
    extensions = get_img_extensions(as_set=True)
    entries = (entry for entry in root.iterdir() if not entry.name.startswith("."))
    folders = sorted(entry for entry in entries if entry.is_dir())
    if not folders:
        raise UserError(f"no class folders in {root}: images belong in {root}/CLASS/")
    for folder in folders:
        if not any(path.suffix.lower() in extensions for path in _files(folder)):
            raise UserError(
                f"class folder {folder} holds no images "
                f"({', '.join(sorted(extensions))}); add some or remove the folder"
            )


def _files(folder: Path) -> Iterator[Path]:
    for where, _, names in os.walk(folder, followlinks=True):
        for name in names:
            yield Path(where, name)


def _class_names(reader: Any) -> list[str] | None:
    # The second name is that of timm's tar reader.
    table = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    if not table or sorted(table.values()) != list(range(len(table))):
        return None
    return [str(name) for name in sorted(table, key=table.__getitem__)]
