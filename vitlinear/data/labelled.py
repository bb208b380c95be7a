"""Data sets of decoded images with labels, or what takes the place of an unreadable image."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image
from timm.data import IterableImageDataset
from torch.utils.data import Dataset, get_worker_info

from vitlinear.errors import UserError, one_line

from .bad_images import LIMIT, UNREADABLE, BadImages, too_many
from .images import DAMAGE, UnreadableImage, pixels
from .order import derive_seed, seed_everything
from .sources import Source

BLANK = (64, 64)  # pixels of the image in place of an unreadable held-out one


class LabelledImages(Dataset):
    """A `Source` in one PIL mode, with the ``transform`` attribute that timm's loaders set.

    Args:
        source: Images and labels.
        image_mode: PIL mode that images are converted to.
        train: In place of an unreadable image comes the next one; in held-out data a black one
            labelled `UNREADABLE`, which `evaluate` leaves out.
        bad_images: Whether unreadable images are errors, and where they are recorded.
        num_classes: Bound of the labels, if the source does not know its classes.

    Attributes:
        notes: Lines for the user about what the source left out.
    """

    transform: Callable[[Image.Image], Any] | None = None

    def __init__(
        self,
        source: Source,
        image_mode: str,
        train: bool = True,
        bad_images: BadImages | None = None,
        num_classes: int | None = None,
    ) -> None:
        self.source, self.image_mode, self.train = source, image_mode, train
        self.bad_images = bad_images or BadImages()
        names = source.classes
        self.classes: list[str] | None = None if names is None else [str(name) for name in names]
        self.num_classes = len(self.classes) if self.classes else num_classes
        self.notes: list[str] = getattr(source, "notes", [])
        self._in_a_row = 0  # unreadable held-out images, in this process

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Returns an image, without ``transform``, and its label.

        Raises:
            UnreadableImage: The image is damaged or gone.
            UserError: The label cannot be.
        """
        try:
            content, label = self.source.read(index)
            image = pixels(content, self.image_mode)
        except DAMAGE as error:
            raise UnreadableImage(self.source.name(index), error) from error
        if not _is_label(label, self.num_classes):
            raise _wrong_label(self.source.name(index), label, self.num_classes)
        return image, label

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            image, label = self.load(index)
            self._in_a_row = 0
        except UnreadableImage as error:
            self.bad_images.add(error)
            image, label = self._instead_of(index, error.name)
        return (self.transform(image) if self.transform else image), label

    def _instead_of(self, index: int, name: str) -> tuple[Image.Image, int]:
        """Returns the next readable image: the same in every epoch, mostly of the same class."""
        if not self.train:
            self._in_a_row += 1
            if self._in_a_row == LIMIT:
                raise too_many(name)
            return Image.new(self.image_mode, BLANK), UNREADABLE
        for step in range(1, LIMIT):
            try:
                return self.load((index + step) % len(self))
            except UnreadableImage as error:
                self.bad_images.add(error)
                name = error.name
        raise too_many(name)


def _seeded(reader: Any) -> Iterator[Any]:
    """Yields the samples of a training epoch; worker, epoch and number decide what each draws.

    timm and torch seed a worker once, when it starts: one that lives on would go on drawing. In the
    main process the model draws between samples, but not while a resumed epoch is read again.
    """
    worker = get_worker_info()
    epoch = reader.epoch if hasattr(reader, "epoch") else reader.epoch_count
    parts = (reader.common_seed, epoch.value, reader.dist_rank, "stream")
    samples = iter(reader)
    for number in itertools.count():
        seed = derive_seed(*parts, worker.id if worker else 0, number)
        seed_everything(seed, devices=False)
        try:
            sample = next(samples)
        except StopIteration:
            return
        yield sample


class ShardImages(IterableImageDataset):
    """The images of WebDataset shards.

    Args:
        reader: A `ShardReader`.
        image_mode: PIL mode that images are converted to.
        train: As in `LabelledImages`.
        bad_images: As in `LabelledImages`.
        num_classes: As in `LabelledImages`.
    """

    def __init__(
        self,
        reader: Any,
        image_mode: str,
        train: bool,
        bad_images: BadImages,
        num_classes: int | None,
    ) -> None:
        super().__init__(None, reader=reader)
        self.image_mode, self.train, self.bad_images = image_mode, train, bad_images
        self.classes: list[str] | None = reader.classes
        self.num_classes = len(self.classes) if self.classes else num_classes

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        left = self.reader.samples_per_worker() if self.train else None
        in_a_row = 0
        for name, content, label in _seeded(self.reader) if self.train else self.reader:
            if left == 0:
                return
            if not _is_label(label, self.num_classes):
                raise _wrong_label(name, label, self.num_classes)
            try:
                image = pixels(content, self.image_mode)
                in_a_row = 0
            except DAMAGE as error:
                self.bad_images.add(UnreadableImage(name, error))
                in_a_row += 1
                if in_a_row == LIMIT:
                    raise too_many(name) from error
                if self.train:
                    continue
                image, label = Image.new(self.image_mode, BLANK), UNREADABLE
            yield (self.transform(image) if self.transform else image), label
            left = None if left is None else left - 1


class StreamedImages(IterableImageDataset):
    """A data set that timm itself streams (hfids, tfds)."""

    def __init__(
        self, dataset: IterableImageDataset, name: str, image_mode: str, bad_images: BadImages
    ) -> None:
        if bad_images.skip:
            raise UserError(f"--bad-images skip cannot be done with {name}: use hfds/ or wds/")
        super().__init__(None, reader=dataset.reader)
        self.name, self.image_mode = name, image_mode

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        samples = _seeded(self.reader) if self.reader.is_training else iter(self.reader)
        while True:
            try:
                sample = next(samples, None)
                if sample is None:
                    return
                image, label = pixels(sample[0], self.image_mode), sample[1]
            except DAMAGE as error:
                reason = one_line(error)
                raise UserError(f"cannot read an image of {self.name}: {reason}") from error
            yield (self.transform(image) if self.transform else image), label


def _is_label(label: int, num_classes: int | None) -> bool:
    return 0 <= label < (num_classes or label + 1)


def _wrong_label(name: str, label: int, num_classes: int | None) -> UserError:
    if label < 0:
        return UserError(f"{name} has no label (it says {label}): a split with labels is needed")
    return UserError(
        f"{name} has the label {label}, but there are only {num_classes} classes, 0 to "
        f"{(num_classes or 0) - 1}: correct --num-classes or --class-map"
    )
