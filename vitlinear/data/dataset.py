"""The data set that ``--dataset`` and ``--data-dir`` mean."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageMode
from timm.data import IterableImageDataset
from torch.utils.data import Dataset

from vitlinear.errors import UserError, one_line

from . import sources
from .bad_images import LIMIT, UNREADABLE, BadImages, too_many
from .images import DAMAGE, UnreadableImage, convert, decode
from .readers import open_other, refuse_keys

BLANK = (64, 64)


class LabelledImages(Dataset):
    """A `Source` in one PIL mode, with the ``transform`` attribute that timm's loaders set.

    Args:
        source: Images and labels.
        image_mode: PIL mode that images are converted to.
        train: In place of an unreadable image comes the next one; in held-out data a black one
            labelled `UNREADABLE`, which `evaluate` leaves out.
        bad_images: Whether unreadable images are errors, and where they are recorded.
        num_classes: Bound of the labels, if the source does not know its classes.
    """

    transform: Callable[[Image.Image], Any] | None = None

    def __init__(
        self,
        source: sources.Source,
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
            image = convert(_decoded(content), self.image_mode)
        except DAMAGE as error:
            raise UnreadableImage(self.source.name(index), error) from error
        if not _is_label(label, self.num_classes):
            raise _wrong_label(self.source.name(index), label, self.num_classes)
        return image, label

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            image, label = self.load(index)
        except UnreadableImage as error:
            self.bad_images.add(error)
            image, label = self._instead_of(index)
        return (self.transform(image) if self.transform else image), label

    def _instead_of(self, index: int) -> tuple[Image.Image, int]:
        """Returns the next readable image: the same in every epoch, mostly of the same class."""
        if not self.train:
            return Image.new(self.image_mode, BLANK), UNREADABLE
        for step in range(1, LIMIT):
            try:
                return self.load((index + step) % len(self))
            except UnreadableImage as error:
                self.bad_images.add(error)
                name = error.name
        raise too_many(name)


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
        for name, content, label in self.reader:
            if left == 0:
                return
            if not _is_label(label, self.num_classes):
                raise _wrong_label(name, label, self.num_classes)
            try:
                image = convert(_decoded(content), self.image_mode)
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

    def __init__(self, dataset: IterableImageDataset, name: str, bad_images: BadImages) -> None:
        if bad_images.skip:
            raise UserError(f"--bad-images skip cannot be done with {name}: use hfds/ or wds/")
        super().__init__(None, reader=dataset.reader)
        self.name = name

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        samples = super().__iter__()
        while True:
            try:
                sample = next(samples, None)
            except DAMAGE as error:
                reason = one_line(error)
                raise UserError(f"cannot read an image of {self.name}: {reason}") from error
            if sample is None:
                return
            yield sample


def _decoded(content: bytes | Image.Image) -> Image.Image:
    return decode(content) if isinstance(content, bytes) else content


def _is_label(label: int, num_classes: int | None) -> bool:
    return 0 <= label < (num_classes or label + 1)


def _wrong_label(name: str, label: int, num_classes: int | None) -> UserError:
    if label < 0:
        return UserError(f"{name} has no label (it says {label}): a split with labels is needed")
    return UserError(
        f"{name} has the label {label}, but there are only {num_classes} classes, 0 to "
        f"{(num_classes or 0) - 1}: correct --num-classes or --class-map"
    )


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
        split: Split name for everything but the two embedded sets.
        **options: More arguments of ``create_dataset``.

    Returns:
        A `sources.Source`, a `ShardReader`, or timm's own iterable data set.
    """
    path = Path(data_dir).expanduser() if data_dir else None
    options = {key: value for key, value in options.items() if value is not None}
    refuse_keys(name or "--data-dir", options)
    if name == "digits":
        return sources.digits(train)
    if name == "fashion_mnist":
        return sources.fashion_mnist(train, path)
    if split is None:
        split = "train" if train else "validation"
    return open_other(name or "", path, split, mode, **({"is_training": train} | options))


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
        return StreamedImages(found, name or "", bad_images)
    kind = LabelledImages if hasattr(found, "read") else ShardImages
    return kind(found, mode, train, bad_images, num_classes)


def source_options(args: argparse.Namespace, train: bool) -> dict[str, Any]:
    """Returns the arguments of `open_source` that parsed flags mean."""
    return {
        "data_dir": args.data_dir,
        "split": args.train_split if train else args.val_split,
        "class_map": args.class_map,
        "download": args.dataset_download,
        "input_key": args.input_key,
        "target_key": args.target_key,
    }


def open_from_arguments(
    args: argparse.Namespace, train: bool, mode: str, bad_images: BadImages | None = None
) -> Any:
    """Opens the split that parsed flags mean."""
    return open_dataset(
        args.dataset,
        train=train,
        mode=mode,
        num_classes=args.num_classes,
        bad_images=bad_images,
        batch_size=args.batch_size,
        seed=args.seed if train else None,
        **source_options(args, train),
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
    content, label = dataset.source.read(index)
    image = _decoded(content)
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
