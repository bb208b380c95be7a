"""Every image of a split read once, in parallel: what it is, or why it cannot be read."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from PIL import Image
from timm.data import IterableImageDataset
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from vitlinear.errors import UserError

from .images import (
    DAMAGE,
    Depth,
    decode,
    depth,
    has_transparency,
    is_deep,
    orientation,
    pixels,
    printable,
    reason,
)
from .sources import Source

BATCH = 32  # images per message of a data worker


class Record(NamedTuple):
    """An image as `probe` found it.

    Attributes:
        name: File, or number.
        label: Class; None where it could not be read.
        error: Why the image cannot be used, or None.
        digest: Of the content, 64 bits; 0 for unreadable images.
        size: Width and height in pixels.
        mode: Pillow's.
        format: Pillow's, or None for images that were no files.
        content_bytes: Size of the file, or None.
        orientation: EXIF's, 1 for upright.
        depth: Values of a grey image of more than 8 bits, or None.
        transparent: Whether one can see through it.
        frames: Whether there are several frames or pages.
    """

    name: str
    label: int | None
    error: str | None = None
    digest: int = 0
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    format: str | None = None
    content_bytes: int | None = None
    orientation: int = 1
    depth: Depth | None = None
    transparent: bool = False
    frames: bool = False


def examine(name: str, content: bytes | Image.Image, label: int) -> Record:
    """Decodes one image and describes it."""
    name = printable(name)
    try:
        image = decode(content)
        met = depth(image) if is_deep(image.mode) else None
        transparent, turned = has_transparency(image), orientation(image)
        if met is None or not met.outside:  # which is warned of, here it is told
            pixels(image, "RGB")
    except DAMAGE as error:
        return Record(name, label, reason(error))
    raw = content if isinstance(content, bytes) else f"{image.mode}{image.size}".encode()
    digest = hashlib.blake2b(raw, digest_size=8)
    if not isinstance(content, bytes):
        digest.update(image.tobytes())
    return Record(
        name,
        label,
        digest=int.from_bytes(digest.digest(), "big"),
        size=image.size,
        mode=image.mode,
        format=image.format,
        content_bytes=len(content) if isinstance(content, bytes) else None,
        orientation=turned,
        depth=met,
        transparent=transparent,
        frames=_has_frames(image),
    )


def _has_frames(image: Image.Image) -> bool:
    # the others are a preview and layers; the first is the whole picture
    if image.format in ("MPO", "PSD"):
        return False
    try:
        return getattr(image, "is_animated", False)
    except DAMAGE:  # of the second
        return True


class _Images(Dataset):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        try:
            content, label = self.source.read(index)
        except DAMAGE as error:
            return Record(printable(self.source.name(index)), None, reason(error))
        except UserError as error:
            return Record(printable(self.source.name(index)), None, str(error))
        return examine(self.source.name(index), content, label)


class _Shards(IterableDataset):
    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __iter__(self) -> Iterator[Record]:
        for url, samples in self.reader.shards():
            try:
                for sample in samples:
                    yield examine(*sample)
            except UserError as error:
                yield Record(printable(url), None, str(error))


class _Stream(IterableDataset):
    def __init__(self, dataset: IterableImageDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Record]:
        for number, (image, label) in enumerate(self.dataset):
            yield examine(f"number {number}", image, int(label))


def probe(source: Any, workers: int, title: str) -> Iterator[Record]:
    """Yields a record of every image, in order unless there are several workers and shards.

    Args:
        source: A `Source`, a `ShardReader` that is not for training, or timm's iterable data set.
        workers: Data workers; 0 reads in this process.
        title: Left of the progress bar.
    """
    images: Dataset
    if isinstance(source, IterableImageDataset):
        source.set_loader_cfg(num_workers=workers)
        images, count = _Stream(source), len(source)
    elif hasattr(source, "shards"):
        source.set_loader_cfg(num_workers=workers)
        images, count = _Shards(source), source.num_samples
    else:
        images, count = _Images(source), len(source)
    batches = DataLoader(images, BATCH, num_workers=workers, collate_fn=list)
    with tqdm(total=count, desc=title, unit=" images", leave=False, disable=None) as bar:
        for batch in batches:
            bar.update(len(batch))
            yield from batch
