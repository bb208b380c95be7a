"""The flags that several commands have, under timm's names, in the groups of ``--help``."""

import argparse
import os
from argparse import BooleanOptionalAction

from .parser import KeyValues, Parser


def _at_least(low: float, kind: type) -> "type":
    """Returns an argparse type: ``kind``, refused below ``low``."""

    def convert(text: str) -> float:
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"must be at least {low:g}, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse prints it: "invalid int value: 'x'"
    return convert  # type: ignore[return-value]


COUNT = _at_least(1, int)
NATURAL = _at_least(0, int)
RATE = _at_least(0.0, float)
POSITIVE = _at_least(1e-6, float)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_data_arguments(parser: Parser) -> None:
    """Which images."""
    group = parser.add_argument_group("data")
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
    group.add_argument("--class-map", default=None, metavar="FILE", help="class name per line")
    group.add_argument("--input-key", default=None, metavar="NAME", help="image, in hfds/ and wds/")
    group.add_argument("--target-key", default=None, metavar="NAME", help="label, likewise")
    group.add_argument(
        "--dataset-download", action=BooleanOptionalAction, default=False, help="fetch torch/ data"
    )
    group.add_argument(
        "--input-img-mode", default=None, metavar="MODE", help="PIL mode (default: L or RGB)"
    )
    group.add_argument(
        "-j",
        "--workers",
        type=NATURAL,
        default=min(4, CORES),
        metavar="N",
        help="processes that read images (default: 4, or as many as there are cores)",
    )
    group.add_argument("--pin-mem", action=BooleanOptionalAction, default=False, help="pin memory")


def add_bad_images_argument(parser: Parser) -> None:
    """What becomes of unreadable images."""
    group = parser.add_argument_group("unreadable images")
    group.add_argument(
        "--bad-images",
        default="error",
        choices=("error", "skip"),
        help="unreadable images: stop, or go on without them and list them (of a run, in "
        "bad_images.txt)",
    )


def add_input_arguments(parser: Parser) -> None:
    """How an image becomes a tensor, for evaluation."""
    group = parser.add_argument_group("input")
    group.add_argument("--img-size", type=COUNT, default=None, metavar="N", help="square input")
    group.add_argument("--in-chans", type=COUNT, default=None, metavar="N", help="channels")
    group.add_argument(
        "--input-size", type=COUNT, nargs=3, default=None, metavar=("C", "H", "W"), help="input"
    )
    group.add_argument("--crop-pct", type=RATE, default=None, metavar="P", help="centre crop part")
    group.add_argument(
        "--crop-mode",
        default=None,
        choices=("center", "squash", "border"),
        help="how the centre is cropped",
    )
    group.add_argument(
        "--mean",
        type=float,
        nargs="+",
        default=None,
        metavar="M",
        help="of the channels, from 0 to 1",
    )
    group.add_argument("--std", type=float, nargs="+", default=None, metavar="S", help="likewise")
    group.add_argument("--interpolation", default=None, metavar="NAME", help="bicubic, bilinear")


def add_device_arguments(parser: Parser) -> None:
    """Where it runs and in which precision."""
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device", default=None, metavar="DEV", help="default: cuda if there is one"
    )
    group.add_argument("--amp", action=BooleanOptionalAction, default=False, help="autocast")
    group.add_argument(
        "--amp-dtype", default="float16", choices=("float16", "bfloat16"), help="of --amp"
    )
    group.add_argument(
        "--channels-last",
        action=BooleanOptionalAction,
        default=False,
        help="memory format of images and weights",
    )


def add_model_arguments(parser: Parser, default: str | None) -> None:
    """Which model."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default=default, metavar="NAME", help="any timm or vitlinear name"
    )
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        action=KeyValues,
        default={},
        metavar="K=V",
        help="constructor arguments; given here, they replace those of --config",
    )
    group.add_argument(
        "--num-classes", type=COUNT, default=None, metavar="N", help="default: from the data"
    )
    group.add_argument(
        "--pretrained",
        action=BooleanOptionalAction,
        default=False,
        help="start from the published weights",
    )


def add_checkpoint_argument(parser: Parser) -> None:
    """The flag that validate and predict share."""
    parser.add_argument(
        "--checkpoint", default=None, metavar="FILE", help="best.safetensors, or a file timm reads"
    )
