"""The model that a command is about, and how images become its input."""

import dataclasses
from argparse import BooleanOptionalAction
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .flags import COUNT, POSITIVE, REAL, file_name
from .parser import KeyValues, Parser


@dataclass(frozen=True)
class ModelConfig:
    """A model by its name, for `vitlinear.create.build_model`."""

    model: str | None
    model_kwargs: Mapping[str, Any]
    num_classes: int | None
    pretrained: bool


def add_model_flags(parser: Parser, default: str | None = None, positional: bool = False) -> None:
    """Adds the flags of `ModelConfig`.

    Args:
        parser: Of the command.
        default: Of ``--model``.
        positional: Take the model as the argument MODEL, without a flag.
    """
    group = parser.group("model")
    if positional:
        parser.add_argument("model", metavar="MODEL", help="name, with a tag or without")
    else:
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


def add_checkpoint_flag(parser: Parser) -> None:
    """Adds ``--checkpoint``, which names trained weights."""
    parser.add_argument(
        "--checkpoint",
        type=file_name,
        default=None,
        metavar="FILE",
        help="best.safetensors, or a file timm reads",
    )


@dataclass(frozen=True)
class InputConfig:
    """Size, crop and normalisation of images; None leaves a value to the model."""

    img_size: int | None
    in_chans: int | None
    input_size: tuple[int, int, int] | None
    crop_pct: float | None
    crop_mode: str | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    interpolation: str | None

    @property
    def channels(self) -> int | None:
        """Channels that are asked for by either flag."""
        return self.input_size[0] if self.input_size else self.in_chans

    def sizes(self) -> dict[str, Any]:
        """Returns the arguments of a constructor that is given its input size."""
        return {"img_size": self.img_size, "input_size": self.input_size}

    def given(self) -> dict[str, Any]:
        """Returns what was asked for, by flag, without what was not."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if value is not None}


def add_input_flags(parser: Parser) -> None:
    """Adds the flags of `InputConfig`."""
    group = parser.group("input")
    group.add_argument("--img-size", type=COUNT, default=None, metavar="N", help="square input")
    group.add_argument("--in-chans", type=COUNT, default=None, metavar="N", help="channels")
    group.add_argument(
        "--input-size", type=COUNT, nargs=3, default=None, metavar=("C", "H", "W"), help="input"
    )
    group.add_argument(
        "--crop-pct", type=POSITIVE, default=None, metavar="P", help="centre crop part"
    )
    group.add_argument(
        "--crop-mode",
        default=None,
        choices=("center", "squash", "border"),
        help="how the centre is cropped",
    )
    group.add_argument(
        "--mean",
        type=REAL,
        nargs="+",
        default=None,
        metavar="M",
        help="of the channels, from 0 to 1",
    )
    group.add_argument(
        "--std", type=POSITIVE, nargs="+", default=None, metavar="S", help="likewise"
    )
    group.add_argument("--interpolation", default=None, metavar="NAME", help="bicubic, bilinear")
