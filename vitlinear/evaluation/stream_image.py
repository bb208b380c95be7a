"""The ``stream`` command: a model on an image larger than memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitlinear.cli.device import choose_device
from vitlinear.cli.flags import COUNT, NATURAL, file_name, from_arguments
from vitlinear.cli.model_flags import (
    InputConfig,
    ModelConfig,
    add_checkpoint_flag,
    add_input_flags,
    add_model_flags,
)
from vitlinear.cli.parser import Parser
from vitlinear.errors import UserError
from vitlinear.files import check_no_input
from vitlinear.streaming import PCA, stream

from .load_or_build import load_or_build


@dataclass(frozen=True)
class StreamConfig:
    """Model, image and result of ``stream``."""

    source: str
    checkpoint: str | None
    model: ModelConfig
    input: InputConfig
    output: str
    map: str
    level: int
    layout: str | None
    memory: str
    workdir: str | None
    band_rows: int | None
    pca: bool
    mask: str | None
    overwrite: bool
    device: str | None


def parse_arguments(argv: Sequence[str] | None, prog: str = "vitlinear stream") -> StreamConfig:
    """Parses flags."""
    parser = Parser(
        prog=prog,
        description="Write the features of an image that does not fit into memory. They are those "
        "of the whole image, not of tiles.",
    )
    add_model_flags(parser, positional=True)
    parser.add_argument("source", metavar="SOURCE", help="image: .npy, .zarr, TIFF, a slide")
    parser.add_argument(
        "-o",
        "--output",
        type=file_name,
        required=True,
        metavar="FILE",
        help="the map: .npy, .zarr, .tif or .tiff",
    )
    parser.add_argument(
        "--map",
        default="features",
        metavar="MAP",
        help="features, after the last norm, or the number of a map of forward_intermediates",
    )
    parser.add_argument(
        "--pca", action="store_true", help="write the map's principal components, an RGB image"
    )
    parser.add_argument(
        "--mask",
        choices=("tissue", "valid"),
        default=None,
        help="write NaN where there is no tissue, or no data; it changes no other value",
    )
    add_checkpoint_flag(parser)
    add_input_flags(parser)
    group = parser.group("image")
    group.add_argument("--level", type=NATURAL, default=0, metavar="N", help="of a pyramid")
    group.add_argument("--layout", choices=("CHW", "HWC"), default=None, help="of an array")
    group = parser.group("run")
    group.add_argument("--memory", default="4GiB", metavar="SIZE", help="that it may take")
    group.add_argument(
        "--workdir",
        default=None,
        metavar="DIR",
        help="keeps maps on disk, and what the same command needs to go on after an interruption",
    )
    group.add_argument(
        "--band-rows", type=COUNT, default=None, metavar="N", help="default: what fits"
    )
    group.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    group.add_argument("--device", default=None, metavar="DEV", help="default: cuda, if there is")
    return from_arguments(StreamConfig, parser.parse_args(argv))


def main(argv: Sequence[str] | None, prog: str = "vitlinear stream") -> None:
    """Runs the command."""
    config = parse_arguments(argv, prog)
    for flag, value in (
        ("--num-classes", config.model.num_classes),
        ("--crop-pct", config.input.crop_pct),
        ("--crop-mode", config.input.crop_mode),
        ("--interpolation", config.input.interpolation),
    ):
        if value is not None:
            raise UserError(
                f"{flag} means nothing here: the features of the whole image are written as it is"
            )
    check_no_input(config.output, (config.source, config.checkpoint))
    device = choose_device(config.device)
    model, _, preprocessing = load_or_build(config.checkpoint, config.model, config.input)
    chosen: str | int = int(config.map) if config.map.isdigit() else config.map
    stream(
        model.to(device),
        Path(config.source),
        config.output,
        output=PCA(chosen) if config.pca else chosen,
        memory=config.memory,
        workdir=config.workdir,
        layout=config.layout,
        level=config.level,
        mean=preprocessing.mean,
        std=preprocessing.std,
        band_rows=config.band_rows,
        mask=config.mask,
        overwrite=config.overwrite,
        progress=True,
    )
    print(f"wrote {config.output}")
