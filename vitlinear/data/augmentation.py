"""Random changes to training images: crops, colours, erasing, and the mixing of pairs."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import FastCollateMixup, auto_augment, create_transform

from vitlinear.cli.flags import COUNT, NATURAL, POSITIVE, PROBABILITY, RATE, SHARE
from vitlinear.cli.parser import Parser
from vitlinear.create import INTERPOLATIONS
from vitlinear.errors import UserError, one_line


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes to training images, and the smoothing of their labels, in timm's terms."""

    no_aug: bool
    train_crop_mode: str | None
    scale: tuple[float, float]
    ratio: tuple[float, float]
    hflip: float
    vflip: float
    color_jitter: float
    aa: str | None
    aug_repeats: float
    train_interpolation: str
    reprob: float
    remode: str
    recount: int
    mixup: float
    cutmix: float
    mixup_prob: float
    mixup_switch_prob: float
    mixup_mode: str
    mixup_off_epoch: int
    smoothing: float

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed, which makes their targets distributions."""
        return not self.no_aug and (self.mixup > 0 or self.cutmix > 0)

    @property
    def repeats(self) -> float:
        """Augmentations of an image in an epoch; 0 for none."""
        return 0 if self.no_aug else self.aug_repeats


def add_augmentation_flags(parser: Parser) -> None:
    """Adds the flags of `AugmentationConfig`."""
    group = parser.group("augmentation")
    group.add_argument("--no-aug", action="store_true", default=False, help="resize and crop only")
    group.add_argument(
        "--aug", dest="no_aug", action="store_false", default=False, help="takes --no-aug back"
    )
    group.add_argument(
        "--train-crop-mode",
        default=None,
        choices=("rrc", "rkrc", "rkrr"),
        help="random resized crop, or timm's ratio-keeping ones",
    )
    group.add_argument(
        "--scale",
        type=POSITIVE,
        nargs=2,
        default=[0.08, 1.0],
        metavar=("LO", "HI"),
        help="area of a random crop",
    )
    group.add_argument(
        "--ratio",
        type=POSITIVE,
        nargs=2,
        default=[0.75, 4 / 3],
        metavar=("LO", "HI"),
        help="its width by its height",
    )
    group.add_argument(
        "--hflip", type=PROBABILITY, default=0.5, help="probability of a horizontal flip"
    )
    group.add_argument("--vflip", type=PROBABILITY, default=0.0, help="of a vertical one")
    group.add_argument("--color-jitter", type=RATE, default=0.4, help="without --aa")
    group.add_argument("--aa", default=None, metavar="POLICY", help="e.g. rand-m9-mstd0.5-inc1")
    group.add_argument("--aug-repeats", type=RATE, default=0, metavar="N", help="repeated aug.")
    group.add_argument(
        "--train-interpolation",
        default="random",
        metavar="NAME",
        help="random: bilinear or bicubic",
    )
    group.add_argument("--reprob", type=PROBABILITY, default=0.0, help="random erasing probability")
    group.add_argument(
        "--remode",
        default="pixel",
        choices=("const", "rand", "pixel"),
        help="what fills the erased part",
    )
    group.add_argument("--recount", type=COUNT, default=1, help="erased parts in an image")
    group.add_argument(
        "--mixup", type=RATE, default=0.0, metavar="ALPHA", help="alpha of mixup; 0: off"
    )
    group.add_argument(
        "--cutmix", type=RATE, default=0.0, metavar="ALPHA", help="likewise of CutMix"
    )
    group.add_argument("--mixup-prob", type=PROBABILITY, default=1.0, help="of mixing a batch")
    group.add_argument(
        "--mixup-switch-prob", type=PROBABILITY, default=0.5, help="of CutMix where both are on"
    )
    group.add_argument(
        "--mixup-mode",
        default="batch",
        choices=("batch", "pair", "elem"),
        help="a draw for each batch, pair or image",
    )
    group.add_argument("--mixup-off-epoch", type=NATURAL, default=0, help="0: never off")
    group.add_argument("--smoothing", type=SHARE, default=0.1, help="of labels")
    for flag in ("remode", "recount"):
        parser.needs(flag, "reprob")
    for flag in ("mixup_prob", "mixup_mode", "mixup_off_epoch"):
        parser.needs(flag, "mixup", "cutmix")
    for other in ("mixup", "cutmix"):
        parser.needs("mixup_switch_prob", other)


class Mixing(FastCollateMixup):
    """timm's mixing of batches, which can be switched off in data workers that go on living.

    Attributes:
        mixup_enabled: Whether batches are mixed, in this process and in its data workers.
    """

    def __init__(self, **options: Any) -> None:
        self._enabled = torch.ones(1, dtype=torch.bool).share_memory_()
        super().__init__(**options)

    @property
    def mixup_enabled(self) -> bool:
        return bool(self._enabled)

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self._enabled.fill_(enabled)


def make_mixing(config: AugmentationConfig, batch_size: int, num_classes: int) -> Mixing | None:
    """Returns the function that makes a batch of images and mixes it; None if nothing is mixed.

    Raises:
        UserError: Batches of an odd size cannot be mixed.
    """
    if not config.mixes:
        return None
    if batch_size % 2:
        raise UserError(f"mixup and cutmix need an even --batch-size, got {batch_size}")
    return Mixing(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )


def check_augmentation(config: AugmentationConfig, mode: str) -> None:
    """Refuses changes to images that do not exist, or that images of a PIL mode do not take.

    Raises:
        UserError: It would be an error of Pillow's or timm's, on the first image or on a later one.
    """
    if config.train_interpolation not in ("random", *INTERPOLATIONS):
        raise UserError(
            f"unknown --train-interpolation {config.train_interpolation}: random, "
            f"{', '.join(INTERPOLATIONS)}"
        )
    for flag, (low, high) in (("--scale", config.scale), ("--ratio", config.ratio)):
        if low > high:
            raise UserError(f"{flag} {low:g} {high:g}: the lower bound comes first")
    if config.no_aug:
        return
    if config.aa:
        try:
            create_transform(32, is_training=True, auto_augment=config.aa)
        except (AssertionError, IndexError, KeyError, ValueError) as error:
            why = f" ({one_line(error)})" if str(error) else ""
            raise UserError(
                f"--aa {config.aa} is no policy that timm knows{why}: rand-m9-mstd0.5-inc1, "
                "original, 3a, augmix-m5-w4, say"
            ) from error
        if mode not in ("L", "RGB"):
            raise UserError(
                f"--aa changes images of the modes L and RGB, not {mode}: leave it out, or "
                "--input-img-mode"
            )
    elif config.color_jitter and mode == "LAB":
        raise UserError("--color-jitter does not change images of the mode LAB: make it 0")


def transform_options(config: AugmentationConfig) -> dict[str, Any]:
    """Returns the arguments of timm's ``create_loader`` for changes to single images."""
    return {
        "no_aug": config.no_aug,
        "re_prob": config.reprob,
        "re_mode": config.remode,
        "re_count": config.recount,
        "train_crop_mode": config.train_crop_mode,
        "scale": config.scale,
        "ratio": config.ratio,
        "hflip": config.hflip,
        "vflip": config.vflip,
        "color_jitter": config.color_jitter,
        "auto_augment": config.aa,
        "interpolation": config.train_interpolation,
    }


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keeps the ``bits`` highest bits of each channel; none of them gives black.

    timm's ``-inc`` policies ask for 0 bits at their greatest strength (one image in some hundreds
    with rand-m9-mstd0.5-inc1). Pillow took that for black until its version 13 raised an error.
    """
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits >= 1 else image.point(lambda _: 0)


def repair_posterize() -> None:
    """Has timm's policies use `posterize`."""
    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        auto_augment.NAME_TO_OP[name] = posterize
