"""The ``convert`` command: a checkpoint of the authors' to a safetensors file that says what it is.

The model is recognised from the weights: of the registered models, built without storage, the one
whose keys and shapes are all there once the checkpoint filter has translated them.
"""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import vitlinear
from vitlinear.cards import registry
from vitlinear.cards.facts import counts, family_of
from vitlinear.cards.render import mega
from vitlinear.errors import UserError, one_line
from vitlinear.train.checkpoint import Card, check_parent, save_weights
from vitlinear.train.config import Parser, did_you_mean
from vitlinear.train.model import data_config

from .download import digest
from .filter import checkpoint_filter_fn
from .mappings import find_mapping
from .published import NONE_STATED, PUBLISHED, PublishedFile, published_files
from .unwrap import find_weights

# Models whose size is further from the checkpoint's than this factor are tried last.
NEAR = 1.6
SHOWN = 12  # keys of each kind in a report


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Everything in a checkpoint file, without running code from it.

    Raises:
        UserError: It is missing, damaged, not a checkpoint, or would run code.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {what}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # Files since PyTorch 1.6 are archives, which can be read where they lie: of a training
        # checkpoint only the weights are then brought into memory.
        # Settings beside the weights: values without code. yacs's are read into a plain dict.
        safe: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
        with torch.serialization.safe_globals(safe), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that it may not know
            checkpoint = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        if names := _forbidden(str(error)):
            raise UserError(
                f"checkpoint {path} needs code that it names to be run ({names}); that is refused, "
                "for such a file can do anything: save its tensors alone, with a program you trust"
            ) from error
        raise _damaged(path, error) from error
    except (
        safetensors.SafetensorError, OSError, RuntimeError, EOFError, LookupError, ValueError,
        TypeError, AttributeError, ImportError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise _damaged(path, error) from error
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"checkpoint {path} holds a {type(checkpoint).__name__}, not weights")
    return checkpoint


def _damaged(path: Path, error: BaseException) -> UserError:
    return UserError(
        f"checkpoint {path} is truncated, corrupt or not a weights file "
        f"({one_line(error)[:200]}); use another copy"
    )


def _forbidden(message: str) -> str:
    """What a refused pickle wanted to call, from PyTorch's message; empty if it was just broken."""
    found = re.findall(
        r"GLOBAL (\S+)"
        r"|allowlisted via `add_safe_globals`,? but got (?:<class ')?([\w.]+)"
        r"|unrecognized function (.+?)\s",
        message.rpartition("WeightsUnpickler error:")[2],
    )
    return ", ".join(dict.fromkeys("".join(names) for names in found))


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
        resampled: Weights that the filter had to compute anew, such as positions of another size.
    """

    name: str
    num_classes: int
    in_chans: int
    weights: Mapping[str, Tensor]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]
    resampled: int

    @property
    def problems(self) -> int:
        """Keys that do not fit."""
        return len(self.missing) + len(self.unexpected) + len(self.reshaped)


def _storage(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def fit(weights: Mapping[str, Tensor], name: str) -> Fit:
    """Compare weights, of any known layout, with a registered model.

    The classifier may have any width, and the image any number of channels.
    """
    model = registry.on_meta(name)
    converted, own = checkpoint_filter_fn(weights, model), model.state_dict()
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    sizes = {"num_classes": cfg.num_classes, "in_chans": cfg.input_size[0]}
    other = dict(sizes)
    for key, module, axis in (("num_classes", cfg.classifier, 0), ("in_chans", cfg.first_conv, 1)):
        weight = f"{module}.weight"
        if weight in converted and weight in own and converted[weight].ndim > axis:
            groups = own[weight].shape[axis] // sizes[key] if axis else 1
            other[key] = converted[weight].shape[axis] // max(groups, 1)
    if other != sizes and min(other.values()) > 0:
        model = registry.on_meta(name, **other)
        converted, own = checkpoint_filter_fn(weights, model), model.state_dict()
    known = _storage(weights.values())
    return Fit(
        name,
        **other,
        weights=converted,
        missing=tuple(key for key in own if key not in converted),
        unexpected=tuple(key for key in converted if key not in own),
        reshaped=tuple(
            key for key in own if key in converted and own[key].shape != converted[key].shape
        ),
        resampled=sum(
            tensor.untyped_storage().data_ptr() not in known for tensor in converted.values()
        ),
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
        nearest = min(tried, key=lambda candidate: candidate.problems)
        print(_keys_report(nearest))
        raise UserError(
            f"the checkpoint fits no model of this package; nearest is {nearest.name} with "
            f"{_summary(nearest)}"
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


def published_row(path: Path, sha256: str) -> PublishedFile | None:
    """The row of a published file that this is a copy of, by hash, else by name."""
    size = path.stat().st_size
    for row in PUBLISHED:
        if row.task == "classification" and row.sha256 and sha256.startswith(row.sha256):
            return row
    for row in PUBLISHED:
        if row.task == "classification" and row.filename == path.name and row.sha256 is None:
            return row if row.size in (None, size) else None
    return None


def _license(row: PublishedFile | None, name: str) -> str:
    stated = {row.license} if row else {other.license for other in published_files(name)}
    return stated.pop() if len(stated) == 1 else NONE_STATED


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
    checkpoint = read_checkpoint(source)
    try:
        where, weights = find_weights(checkpoint)
    except ValueError as error:
        raise UserError(f"checkpoint {source} cannot be used: {error}") from error
    sha256 = digest(source)
    row = published_row(source, sha256)
    if model is None:
        found = recognise(weights, row)
    else:
        found = fit(weights, model)
        if found.problems:
            print(_keys_report(found))
            raise UserError(f"checkpoint {source} does not fit {model}: {_summary(found)}")
    if row is not None and row.model != found.name:
        row = None  # a file of that name and something else in it
    mapping = find_mapping(weights)
    layout = mapping.name if mapping else "vitlinear"
    license_ = _license(row, found.name)
    metadata = {
        "source_file": source.name,
        "source_sha256": sha256,
        "mapping": layout,
        "model": f"{found.name}.{row.tag}" if row else found.name,
        "license": license_,
        "converted_by": f"vitlinear {vitlinear.__version__}",
    }
    if row is not None:
        metadata["published_at"] = row.location
    built = registry.on_meta(found.name, num_classes=found.num_classes, in_chans=found.in_chans)
    ordered = {key: found.weights[key] for key in built.state_dict()}
    save_weights(target, ordered, _card(built, found), metadata)
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
