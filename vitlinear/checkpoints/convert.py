"""The ``convert`` command: a checkpoint of the authors' to a safetensors file that says what it is.

The model is recognised from the weights: of the registered models, built without storage, the one
whose keys and shapes are all there once the checkpoint filter has translated them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

import vitlinear
from vitlinear.cards import registry
from vitlinear.cards.facts import counts, family_of
from vitlinear.cards.render import mega
from vitlinear.errors import UserError
from vitlinear.train.checkpoint import CARD_KEY, Card, card_of, check_parent, save_weights
from vitlinear.train.config import Parser, did_you_mean
from vitlinear.train.model import data_config

from .download import digest
from .filter import is_detector, rename, resize
from .mappings import find_mapping
from .published import PUBLISHED, PublishedFile
from .read import read_checkpoint, read_metadata
from .unwrap import find_weights

# Models whose size is further from the checkpoint's than this factor are tried last.
NEAR = 1.6
BY_HASH = "SHA-256"
OF_THE_WRITER = ("format", CARD_KEY, "converted_by")  # metadata that each file has anew
SHOWN = 12  # keys of each kind in a report


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a checkpoint fits a model.

    Attributes:
        name: The model's.
        num_classes: Width of the classifier that the checkpoint has, or the model's.
        in_chans: Likewise, channels of the image.
        weights: The checkpoint under the model's keys.
        missing: Keys that only the model has.
        unexpected: Keys that only the checkpoint has.
        reshaped: Keys whose shapes differ.
        matched: Weights, single numbers aside, whose key and shape are the model's.
        resampled: Weights that the filter had to compute anew, such as positions of another size.
    """

    name: str
    num_classes: int
    in_chans: int
    weights: Mapping[str, Tensor]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]
    matched: int
    resampled: int

    @property
    def problems(self) -> int:
        """Keys that do not fit."""
        return len(self.missing) + len(self.unexpected) + len(self.reshaped)


def fit(weights: Mapping[str, Tensor], name: str, **model_kwargs: Any) -> Fit:
    """Compare weights, of any known layout, with a registered model.

    The classifier may have any width, and the image any number of channels.
    """
    model = registry.on_meta(name, **model_kwargs)
    renamed, own = rename(weights, model), model.state_dict()
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    sizes = {"num_classes": cfg.num_classes, "in_chans": cfg.input_size[0]}
    other = dict(sizes)
    for key, module, axis in (("num_classes", cfg.classifier, 0), ("in_chans", cfg.first_conv, 1)):
        weight = f"{module}.weight"
        if weight in renamed and weight in own and renamed[weight].ndim > axis:
            groups = own[weight].shape[axis] // sizes[key] if axis else 1
            other[key] = renamed[weight].shape[axis] // max(groups, 1)
    if other != sizes and min(other.values()) > 0:
        model = registry.on_meta(name, **{**model_kwargs, **other})
        renamed, own = rename(weights, model), model.state_dict()
    converted = resize(renamed, model)
    return Fit(
        name,
        **other,
        weights=converted,
        missing=tuple(key for key in own if key not in converted),
        unexpected=tuple(key for key in converted if key not in own),
        reshaped=tuple(
            key for key in own if key in converted and own[key].shape != converted[key].shape
        ),
        matched=sum(
            value.ndim > 0 and key in converted and converted[key].shape == value.shape
            for key, value in own.items()
        ),
        resampled=sum(converted[key] is not renamed[key] for key in renamed),
    )


def _by_distance(weights: Mapping[str, Tensor]) -> list[list[str]]:
    """Registered models in two lists: those of about the checkpoint's size, and the others."""
    size = sum(tensor.numel() for tensor in weights.values() if tensor.is_floating_point())
    near: list[str] = []
    far: list[str] = []
    for name in registry.our_models():
        params = counts().get(name, {}).get("params", size)
        (near if 1 / NEAR < params / max(size, 1) < NEAR else far).append(name)
    return [near, far]


def recognise(weights: Mapping[str, Tensor], row: PublishedFile | None = None) -> Fit:
    """Find the model that a checkpoint is of.

    Several can have the same keys and shapes. The one that is taken is, of those that need the
    fewest weights computed anew, the one that `row` names; or, for a checkpoint in the authors'
    layout, one that they have released.

    Args:
        weights: Bare weights, of any known layout.
        row: Of the table of published files, if the file is one of them.

    Raises:
        UserError: No model fits, or several; the message names the nearest, or them.
    """
    tried: list[Fit] = []
    for names in _by_distance(weights):
        tried += [fit(weights, name) for name in names]
        if any(candidate.problems == 0 for candidate in tried):
            break
    fitting = [candidate for candidate in tried if candidate.problems == 0]
    if not fitting:
        nearest = max(tried, key=lambda candidate: (candidate.matched, -candidate.problems))
        message = "the checkpoint fits no model of this package"
        if is_detector(weights):
            message += (
                "; it looks like a detector's or segmenter's, which has no classifier: its stages "
                "load with features_only=True and pretrained_cfg_overlay=dict(file=...)"
            )
        if not nearest.matched:
            raise UserError(f"{message}, and none is near: no weight has a model's name and shape")
        print(_keys_report(nearest))
        raise UserError(
            f"{message}; nearest is {nearest.name}, which has {nearest.matched} of its "
            f"{len(weights)} tensors, with {_summary(nearest)}"
        )
    least = min(candidate.resampled for candidate in fitting)
    fitting = [candidate for candidate in fitting if candidate.resampled == least]
    if row is not None and (named := [c for c in fitting if c.name == row.model]):
        fitting = named
    if len(fitting) > 1 and find_mapping(weights) is not None:
        released = [c for c in fitting if family_of(c.name).model(c.name).released]
        fitting = released or fitting
    if len(fitting) > 1:
        several = ", ".join(candidate.name for candidate in fitting)
        raise UserError(f"the checkpoint fits several models: give --model, one of {several}")
    return fitting[0]


def _summary(candidate: Fit) -> str:
    return (
        f"{len(candidate.missing)} missing keys, {len(candidate.unexpected)} unexpected, "
        f"{len(candidate.reshaped)} of another shape"
    )


def _keys_report(candidate: Fit) -> str:
    lines = [f"keys          {_summary(candidate)}"]
    for label, keys in (
        ("missing", candidate.missing),
        ("unexpected", candidate.unexpected),
        ("of another shape", candidate.reshaped),
    ):
        lines += [f"  {label}: {key}" for key in keys[:SHOWN]]
        if len(keys) > SHOWN:
            lines.append(f"  {label}: and {len(keys) - SHOWN} more")
    return "\n".join(lines)


def published_row(path: Path, sha256: str) -> tuple[PublishedFile, str] | None:
    """The row of a published file that this may be a copy of, and what says so.

    The hash, where the row has one; else the name and the size, where it is known; else the name.
    """
    rows = [row for row in PUBLISHED if row.task == "classification"]
    for row in rows:
        if row.sha256 and sha256.startswith(row.sha256):
            return row, BY_HASH
    for row in rows:
        if row.filename == path.name and row.sha256 is None:
            if row.size is None:
                return row, "file name only"
            return (row, "file name and size") if row.size == path.stat().st_size else None
    return None


def _confirmed(match: tuple[PublishedFile, str] | None, found: Fit) -> PublishedFile | None:
    """The row of a match, unless what is in the file is something else, such as fine-tuned."""
    if match is None or match[0].model != found.name:
        return None
    row, how = match
    cfg = timm.get_pretrained_cfg(f"{row.model}.{row.tag}")
    assert cfg is not None
    released = (cfg.num_classes, cfg.input_size[0])
    return row if how == BY_HASH or (found.num_classes, found.in_chans) == released else None


def _card(model: nn.Module, found: Fit) -> Card:
    config = data_config(model, {})
    return Card(
        model=found.name,
        model_kwargs={},
        num_classes=found.num_classes,
        in_chans=found.in_chans,
        data_config={key: list(v) if isinstance(v, tuple) else v for key, v in config.items()},
        image_mode="L" if found.in_chans == 1 else "RGB",
    )


def convert(
    source: Path, target: Path, model: str | None = None, overwrite: bool = False
) -> list[str]:
    """Convert a checkpoint file.

    Args:
        source: A checkpoint of the authors' code, or of ours: .pth, .safetensors, ...
        target: A .safetensors file; appears whole or not at all.
        model: Registered name; by default, recognised.
        overwrite: Replace a file that exists.

    Returns:
        What was done, in lines.

    Raises:
        UserError: See its messages.
    """
    if target.suffix != ".safetensors":
        raise UserError(f"cannot write {target}: the name has to end with .safetensors")
    if target.exists() and source.exists() and target.samefile(source):
        raise UserError(f"{target} is the checkpoint itself: give another name")
    if target.is_dir():
        raise UserError(f"cannot write {target}: it is a folder")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists: give another name, or --overwrite")
    check_parent(str(target))
    if model is not None and model not in registry.our_models():
        raise UserError(f"unknown model '{model}'{did_you_mean(model, registry.our_models())}")
    checkpoint, described = read_checkpoint(source), read_metadata(source)
    try:
        where, weights = find_weights(checkpoint)
    except ValueError as error:
        raise UserError(f"checkpoint {source} cannot be used: {error}") from error
    sha256 = digest(source)
    match = published_row(source, sha256)
    card = card_of(described, source)
    if card is not None and (model or card.model) != card.model:
        card = None  # as the user says
    elif card is not None and card.model.partition(".")[0] not in registry.our_models():
        raise UserError(f"checkpoint {source} is of {card.model}, no model of this package")
    if card is not None:
        model = card.model
        found = fit(weights, model, **card.model_kwargs)
    elif model is not None:
        found = fit(weights, model)
    else:
        found = recognise(weights, match[0] if match else None)
    if found.problems:
        print(_keys_report(found))
        raise UserError(f"checkpoint {source} does not fit {model}: {_summary(found)}")
    row = _confirmed(match, found)
    mapping = find_mapping(weights)
    layout = mapping.name if mapping else "vitlinear"
    metadata = {
        "source_file": source.name,
        "source_sha256": sha256,
        "mapping": layout,
        "model": f"{found.name}.{row.tag}" if row else found.name,
        "converted_by": f"vitlinear {vitlinear.__version__}",
    }
    if match is not None and row is not None:
        metadata |= {"license": row.license, "published_at": row.location, "matched_by": match[1]}
    if card is not None:  # where it came from in the first place
        metadata |= {k: v for k, v in described.items() if k not in OF_THE_WRITER}
    license_ = metadata.get("license", "not known")
    if "matched_by" in metadata:
        how = metadata["matched_by"]
        license_ += f" (that of {metadata['published_at']}, matched by {how})"
    sizes = {"num_classes": found.num_classes, "in_chans": found.in_chans}
    built = registry.on_meta(found.name, **{**(card.model_kwargs if card else {}), **sizes})
    ordered = {key: found.weights[key] for key in built.state_dict()}
    save_weights(target, ordered, card or _card(built, found), metadata)
    left_out = [str(key) for key in checkpoint if key not in where[:1]] if where else []
    size = mega(registry.num_parameters(built))
    return [
        f"source        {source} (SHA-256 {sha256})",
        f"weights       {'under ' + '.'.join(where) if where else 'bare'}"
        + (f"; left out: {', '.join(left_out)}" if left_out else ""),
        f"layout        {layout}",
        f"model         {metadata['model']}, {size} parameters, {found.num_classes} classes, "
        f"{found.in_chans} channels",
        _keys_report(found),
        f"licence       {license_}",
        f"wrote         {target}",
    ]


def main(argv: Sequence[str] | None, prog: str = "vitlinear convert") -> None:
    """Runs ``vitlinear convert``."""
    parser = Parser(
        prog=prog,
        description="Convert a checkpoint of the authors' code to safetensors, which timm loads "
        "with pretrained_cfg_overlay=dict(file=OUT), and validate and predict with --checkpoint.",
    )
    parser.add_argument("source", metavar="IN", type=Path, help="checkpoint; no code in it is run")
    parser.add_argument("target", metavar="OUT", type=Path, help="a .safetensors file")
    parser.add_argument("--model", default=None, metavar="NAME", help="instead of recognising it")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args(argv)
    for line in convert(
        args.source.expanduser(), args.target.expanduser(), args.model, args.overwrite
    ):
        print(line)
