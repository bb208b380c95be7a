"""`Source`, a data set with random access, and the two that are read here.

``digits`` and ``fashion_mnist`` are arrays in memory; `readers` opens everything else.
"""

import gzip
import pickle
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from vitlinear.errors import UserError, pip_install

# What libraries raise when a data set is not there, not whole, or not what it was said to be.
OPENING = (
    AssertionError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    tarfile.TarError,
)
FASHION_MNIST_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


class Source(Protocol):
    """Images and labels by index; ``classes`` is None where the data does not say."""

    classes: Sequence[str] | None

    def __len__(self) -> int:
        """Number of images."""

    def read(self, index: int) -> tuple[bytes | Image.Image, int]:
        """Content of an image file, or an image where there is no file, and the label.

        Raises:
            OSError and what else `images.DAMAGE` lists: it cannot be read.
        """

    def name(self, index: int) -> str:
        """File name, or what else tells an image from the others."""


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

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Image and label."""
        return Image.fromarray(self.images[index]), int(self.labels[index])

    def name(self, index: int) -> str:
        """Its number."""
        return f"number {index}"


def digits(train: bool) -> ArraySource:
    """The 1797 hand-written 8x8 digits that scikit-learn carries (grey levels 0..16, here 0..255).

    The held-out set is a fifth of each class, 359 in all; drawn with numpy's `RandomState(0)`,
    whose stream numpy has frozen, so that it is the same images on every machine.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            f"the digits data set comes with scikit-learn: {pip_install('train')}"
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
