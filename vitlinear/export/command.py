"""The ``export`` command: a model as a file that runs elsewhere, verified."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import split_model_name_tag
from torch import nn

import vitlinear
from vitlinear.cards.info import check_name
from vitlinear.checkpoints.card import IMAGE_MODES, Card, read_card
from vitlinear.checkpoints.download import digest
from vitlinear.checkpoints.load import load_model
from vitlinear.checkpoints.read import read_metadata
from vitlinear.cli.flags import COUNT, file_name, from_arguments, path, values_by_flag
from vitlinear.cli.parser import KeyValues, Parser
from vitlinear.create import build_model, check_model_kwargs, data_config
from vitlinear.errors import UserError
from vitlinear.facts import NONE_STATED, published_row
from vitlinear.files import check_no_input
from vitlinear.revision import source_commit

from . import calibration
from .channels_first import CHANNELS_FIRST, ONNXRUNTIME, RUNTIMES
from .shapes import Range, Shapes
from .write import (
    AUTO,
    FORMATS,
    LAYOUTS,
    check_form,
    check_onnx_packages,
    check_target,
    export,
    model_kwargs,
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
RANDOM = "random"


@dataclass(frozen=True)
class SourceConfig:
    """The model that is exported, and where its weights come from."""

    model: str
    checkpoint: str | None
    pretrained: bool
    num_classes: int | None
    in_chans: int | None
    img_size: int | None
    model_kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class ProgramConfig:
    """The sizes that an exported program takes; None for all that one program can take."""

    batch: Range | None
    height: Range | None
    width: Range | None
    fuse: bool
    layout: str
    runtime: str | None


@dataclass(frozen=True)
class CalibrationConfig:
    """The images to calibrate on; None for what `calibration.read` takes by default."""

    data_dir: str | None
    dataset: str | None
    train_split: str | None
    calibration_images: int | None


@dataclass(frozen=True)
class ExportConfig:
    """Model, program and file of ``export``."""

    source: SourceConfig
    program: ProgramConfig
    calibration: CalibrationConfig
    dtype: str
    out: Path
    format: str | None
    overwrite: bool


def parse_arguments(argv: Sequence[str] | None, prog: str = "vitlinear export") -> ExportConfig:
    """Parses flags."""
    parser = Parser(
        prog=prog,
        description="Write a model of this package to a file, read it back, and keep the file only "
        "if it computes the same as the model.",
    )
    parser.add_argument("model", metavar="MODEL", help="name, with a tag or without")
    parser.add_argument("out", metavar="OUT", type=path, help="file: .onnx, .pt2 or .safetensors")
    parser.add_argument("--format", choices=FORMATS, default=None, help="default: by OUT's suffix")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        type=file_name,
        default=None,
        metavar="FILE",
        help="weights: ours, or the authors'",
    )
    group.add_argument("--pretrained", action="store_true", help="fetch the published weights")
    group.add_argument("--num-classes", type=COUNT, default=None, metavar="N")
    group.add_argument("--in-chans", type=COUNT, default=None, metavar="N")
    group.add_argument(
        "--img-size", type=COUNT, default=None, metavar="N", help="side that the model is made for"
    )
    group.add_argument(
        "--model-kwargs", nargs="*", action=KeyValues, default={}, metavar="K=V",
        help="constructor arguments",
    )  # fmt: skip
    group.add_argument("--fuse", action="store_true", help="model.fuse(): fewer operations")
    group = parser.add_argument_group("program (onnx and torch-export)")
    for name, what in (("batch", "images"), ("height", "pixels"), ("width", "pixels")):
        group.add_argument(
            f"--{name}", type=_range, default=None, metavar="N|LEAST:MOST",
            help=f"{what}, fixed or a range (default: all that one program can take)",
        )  # fmt: skip
    group.add_argument(
        "--dtype", choices=DTYPES, default="float32",
        help="float16, int8: onnx only; int8: what has weights, all else in float32",
    )  # fmt: skip
    group.add_argument(
        "--layout", choices=LAYOUTS, default=AUTO,
        help="of maps in the program; channels-first is of the fused model, for runtimes of ONNX "
        "(default: that for onnx but in float16, where the model has it; else channels-last)",
    )  # fmt: skip
    group.add_argument(
        "--runtime", choices=RUNTIMES, default=None,
        help="for whose speed the layout is chosen; the program runs in any (onnx in float32, "
        f"default: {ONNXRUNTIME})",
    )  # fmt: skip
    group = parser.add_argument_group("images to calibrate on (--dtype int8)")
    group.add_argument(
        "--data-dir", default=None, metavar="DIR", help="a folder of images, classes or not"
    )
    group.add_argument(
        "--dataset", default=None, metavar="NAME",
        help="digits, fashion_mnist, or a name of timm's, as `vitlinear train` takes them "
        "(default: what the checkpoint was trained on)",
    )  # fmt: skip
    group.add_argument("--train-split", default=None, metavar="NAME", help="of it (default: train)")
    group.add_argument(
        "--calibration-images", type=COUNT, default=None, metavar="N",
        help=f"how many (default: {calibration.IMAGES})",
    )  # fmt: skip
    return from_arguments(ExportConfig, parser.parse_args(argv))


def _range(text: str) -> Range:
    try:
        return Range.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _kind(config: ExportConfig) -> str:
    """The format asked for, after checks that need no model."""
    source, out = config.source, config.out
    kinds = {row.suffix: kind for kind, row in FORMATS.items()}
    kind: str | None = config.format or kinds.get(out.suffix)
    if kind is None:
        raise UserError(
            f"cannot tell the format of {out} from its name: give --format "
            f"{'|'.join(FORMATS)}, or a name that ends with {', '.join(kinds)}"
        )
    check_name(source.model)
    check_model_kwargs(source.model_kwargs)
    if kind == "safetensors":
        for flag, value in values_by_flag(config.program).items():
            if value and value != AUTO:
                raise UserError(
                    f"--{flag} is for onnx and torch-export: safetensors hold the weights of the "
                    "model as timm builds it"
                )
    check_form(kind, DTYPES[config.dtype], config.program.layout)
    if config.dtype != "int8":
        for flag, value in values_by_flag(config.calibration).items():
            if value is not None:
                raise UserError(f"--{flag.replace('_', '-')} is for --dtype int8")
    chooses = kind == "onnx" and config.dtype == "float32" and config.program.layout == AUTO
    if config.program.runtime and not chooses:
        raise UserError(
            f"--runtime {config.program.runtime} is for --format onnx, --dtype float32 and "
            f"--layout {AUTO}: elsewhere it chooses nothing; leave it out"
        )
    if source.pretrained and source.checkpoint:
        raise UserError("--pretrained and --checkpoint exclude each other")
    check_target(out, kind, config.overwrite)
    check_no_input(out, (source.checkpoint,))
    if kind == "onnx":
        check_onnx_packages()
    return kind


def _load(source: SourceConfig) -> tuple[nn.Module, Card]:
    chosen: dict[str, Any] = {"num_classes": source.num_classes, "in_chans": source.in_chans}
    card = None
    if source.checkpoint:
        model, card = load_model(
            source.checkpoint,
            # A card names its model with the tag, or without.
            model=_as_the_card_says(source.model, Path(source.checkpoint)),
            model_kwargs=source.model_kwargs,
            img_size=source.img_size,
            **chosen,
        )
    else:
        model = build_model(
            source.model,
            pretrained=source.pretrained,
            sizes={"img_size": source.img_size},
            **chosen,
            **source.model_kwargs,
        ).eval()
    if card is not None:
        height, width = card.data_config.input_size[1:]
        if source.img_size is not None and not height == width == source.img_size:
            raise UserError(
                f"checkpoint {source.checkpoint} is of a model for images of {height}x{width}, not "
                f"of --img-size {source.img_size}: leave it out; --height and --width choose the "
                "sizes that the program takes"
            )
        return model, card
    config = data_config(model, {"img_size": source.img_size} if source.img_size else {})
    channels = config.input_size[0]
    return model, Card(
        model=source.model,
        model_kwargs=model_kwargs(model),
        num_classes=int(model.num_classes),  # type: ignore[arg-type]
        in_chans=channels,
        data_config=config,
        image_mode=IMAGE_MODES.get(channels),
    )


def _as_the_card_says(model: str, path: Path) -> str:
    card = read_card(path) if path.is_file() else None
    same = card is not None and split_model_name_tag(card.model)[0] == model
    return card.model if card is not None and same else model


def _origin(source: SourceConfig, model: nn.Module) -> dict[str, str]:
    """Where the weights come from, and their licence."""
    if source.checkpoint:
        path = Path(source.checkpoint)
        known, sha256 = read_metadata(path), digest(path)
        row = published_row(path, sha256)
        license_ = known.get("license") or (row[0].license if row else "not known")
        return {"weights": path.name, "weights_sha256": sha256, "license": license_}
    if source.pretrained:
        cfg = model.pretrained_cfg
        name = f"{cfg['architecture']}.{cfg['tag']}"  # type: ignore[index]
        if model.num_classes not in (0, cfg["num_classes"]):  # type: ignore[index]
            name += f", with a {RANDOM} classifier of {model.num_classes} classes"
        return {"weights": name, "license": cfg.get("license") or NONE_STATED}  # type: ignore[operator, union-attr]
    return {"weights": RANDOM, "license": "not applicable: random weights"}


def metadata_of(card: Card, **more: object) -> dict[str, str]:
    """Metadata of a file and of the program in it; all but plain text is JSON."""
    config = card.data_config
    values = {
        "model": card.model,
        "model_kwargs": card.model_kwargs,
        "num_classes": card.num_classes,
        "input_size": config.input_size,
        "mean": config.mean,
        "std": config.std,
        "interpolation": config.interpolation,
        "crop_pct": config.crop_pct,
        "crop_mode": config.crop_mode,
        **({"image_mode": card.image_mode} if card.image_mode else {}),
        **({"class_names": card.class_names} if card.class_names else {}),
        **more,
        "made_by": f"vitlinear {vitlinear.__version__}, torch {torch.__version__}",
        "commit": source_commit() or "not known",
    }
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}


def main(argv: Sequence[str] | None, prog: str = "vitlinear export") -> None:
    """Runs ``vitlinear export``."""
    config = parse_arguments(argv, prog)
    source, program, out, dtype = config.source, config.program, config.out, config.dtype
    kind = _kind(config)
    sizes = (program.batch, program.height, program.width)
    Shapes.of(source.model, 3, *sizes)  # mistakes come before the model
    model, card = _load(source)
    shapes = Shapes.of(source.model, card.in_chans, *sizes)
    origin = _origin(source, model)
    about: dict[str, object] = {"shapes": str(shapes), "fused": program.fuse, "dtype": dtype}
    images = None
    if dtype == "int8":
        given = values_by_flag(config.calibration).items()
        images = calibration.read(
            card, shapes, **{flag: value for flag, value in given if value is not None}
        )
        about["calibration"] = f"{len(images.images)} images of {images.source}"
    metadata = metadata_of(card, **about, **origin)
    if program.fuse:
        model.fuse()  # type: ignore[operator]
    written = export(
        model, out, kind, shapes, card, metadata, DTYPES[dtype], images, config.overwrite,
        program.layout, program.runtime or ONNXRUNTIME,
    )  # fmt: skip
    fused = program.fuse or written.layout.startswith(CHANNELS_FIRST)
    print(f"model         {card.model}, {card.num_classes} classes{', fused' * fused}")
    hint = " (give --checkpoint FILE or --pretrained)" if origin["weights"] == RANDOM else ""
    print(f"weights       {origin['weights']}{hint}, licence: {origin['license']}")
    if kind != "safetensors":
        print(f"input         {shapes}, {'float32' if images else dtype}")
        print(f"layout        {written.layout}")
    if images:
        print(f"calibrated    on {about['calibration']}")
        print(f"in float32    {written.left}")
    for size, difference in written.differences.items():
        print(f"verified      {'x'.join(map(str, size))}: differs by {difference:.1e} of the norm")
    print(f"wrote         {out} ({out.stat().st_size:,} bytes)")
