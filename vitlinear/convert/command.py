"""The ``convert`` command: a checkpoint of the authors' to a file that says what it is.

Classifiers become safetensors; detectors and segmentors, see `detectors`, what mmengine reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import timm
from torch import nn

from vitlinear import models as registry
from vitlinear.cards.render import mega
from vitlinear.checkpoints.card import CARD_KEY, IMAGE_MODES, Card, card_of, save_weights
from vitlinear.checkpoints.read import read_metadata
from vitlinear.checkpoints.translate import is_detector
from vitlinear.cli.parser import Parser
from vitlinear.create import data_config
from vitlinear.errors import UserError, did_you_mean
from vitlinear.facts import BY_HASH, PublishedFile
from vitlinear.files import check_new_file

from .detectors import convert_detector
from .original import OriginalFile, local_file
from .recognise import Fit, at_own_size, fit, keys_report, recognise, summary

OF_THE_WRITER = ("format", CARD_KEY, "converted_by")  # metadata that each file has anew


def _confirmed(match: tuple[PublishedFile, str] | None, found: Fit) -> PublishedFile | None:
    """The row of a match, unless what is in the file is something else, such as fine-tuned."""
    if match is None or (match[0].model, match[0].task) != (found.name, "classification"):
        return None
    row, how = match
    cfg = timm.get_pretrained_cfg(f"{row.model}.{row.tag}")
    assert cfg is not None
    released = (cfg.num_classes, cfg.input_size[0])
    return row if how == BY_HASH or (found.num_classes, found.in_chans) == released else None


def _card(model: nn.Module, found: Fit, sizes: dict[str, int]) -> Card:
    return Card(
        model=found.name,
        model_kwargs=sizes,
        num_classes=found.num_classes,
        in_chans=found.in_chans,
        data_config=data_config(model, sizes),
        image_mode=IMAGE_MODES.get(found.in_chans),
    )


def convert(
    path: Path, target: Path, model: str | None = None, overwrite: bool = False
) -> list[str]:
    """Convert a checkpoint file.

    Args:
        path: A checkpoint of the authors' code, or of ours: .pth, .safetensors, ...
        target: A .safetensors file, for detectors and segmentors a .pth one; appears whole or not
            at all.
        model: Registered name, for those of the backbone; by default, recognised.
        overwrite: Replace a file that exists.

    Returns:
        What was done, in lines.

    Raises:
        UserError: See its messages.
    """
    check_new_file(target, overwrite, (path,))
    if model is not None and model not in registry.our_models():
        raise UserError(f"unknown model '{model}'{did_you_mean(model, registry.our_models())}")
    source = OriginalFile.read(path)
    detector = is_detector(source.weights)
    what, suffix = ("detector's", ".pth") if detector else ("classifier's", ".safetensors")
    if target.suffix != suffix:
        raise UserError(
            f"cannot write {target}: {path} holds a {what} weights, so the name has to end with "
            f"{suffix}"
        )
    return (convert_detector if detector else convert_classifier)(source, target, model)


def convert_classifier(source: OriginalFile, target: Path, model: str | None = None) -> list[str]:
    """Convert a classifier; as `convert`, which has checked the target."""
    described = read_metadata(source.path)
    card = card_of(described, source.path)
    if card is not None and (model or card.model) != card.model:
        card = None  # as the user says
    elif card is not None and card.model.partition(".")[0] not in registry.our_models():
        raise UserError(f"checkpoint {source.path} is of {card.model}, no model of this package")
    side = None
    if card is not None:
        model = card.model
        found = fit(source.weights, model, **card.model_kwargs)
    elif model is not None:
        found = fit(source.weights, model)
    else:
        found = recognise(source.weights, {source.match[0].model} if source.match else ())
    if found.problems:
        print(keys_report(found))
        raise UserError(f"checkpoint {source.path} does not fit {model}: {summary(found)}")
    if card is None:
        found, side = at_own_size(source.weights, found)
    row = _confirmed(source.match, found) if side is None else None
    metadata = source.metadata(f"{found.name}.{row.tag}" if row else found.name, row)
    if card is not None:  # where it came from in the first place
        metadata |= {k: v for k, v in described.items() if k not in OF_THE_WRITER}
    sizes = {} if side is None else {"img_size": side}
    built = registry.on_meta(
        found.name,
        **(card.model_kwargs if card else sizes),
        num_classes=found.num_classes,
        in_chans=found.in_chans,
    )
    ordered = {key: found.weights[key] for key in built.state_dict()}
    save_weights(target, ordered, card or _card(built, found, sizes), metadata)
    size = mega(registry.num_parameters(built))
    return [
        *source.report(
            found,
            metadata,
            f"model         {metadata['model']}, {size} parameters, {found.num_classes} classes, "
            f"{found.in_chans} channels" + (f", for images of {side}x{side}" if side else ""),
        ),
        f"wrote         {target}",
        f'load          vitlinear.load("{target}")',
    ]


def main(argv: Sequence[str] | None, prog: str = "vitlinear convert") -> None:
    """Runs ``vitlinear convert``."""
    parser = Parser(
        prog=prog,
        description="Convert a checkpoint of the authors' code: a classifier to safetensors, which "
        "vitlinear.load(OUT) loads in Python, and validate and predict with --checkpoint; a "
        "detector or segmentor of mmdet 2 or mmseg 0 to what mmdet 3 and mmsegmentation 1 take as "
        "load_from.",
    )
    parser.add_argument(
        "source",
        metavar="IN",
        help="checkpoint, or the address of a published one; no code in it is run",
    )
    parser.add_argument(
        "target", metavar="OUT", type=Path, help="a .safetensors file, of a detector a .pth file"
    )
    parser.add_argument(
        "--model",
        default=None,
        metavar="NAME",
        help="model, of a detector its backbone, instead of recognising it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args(argv)
    for line in convert(
        local_file(args.source), args.target.expanduser(), args.model, args.overwrite
    ):
        print(line)
