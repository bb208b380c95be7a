"""Weights of a run as safetensors that describe themselves.

A weights file holds, besides the tensors, what it takes to use them (`Card`): validate and
predict need nothing else. Every file is written under a temporary name, flushed to the disk and
renamed, so that under its own name there is only ever a whole one.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from vitlinear.checkpoints import checkpoint_filter_fn, unwrap_state_dict
from vitlinear.checkpoints.filter import is_detector
from vitlinear.checkpoints.read import CheckpointError, read_checkpoint, read_metadata
from vitlinear.errors import UserError, one_line
from vitlinear.train.folder import BEST
from vitlinear.train.initial import read_head_map, remapped
from vitlinear.train.model import build_model, check_model_name

CARD_KEY = "vitlinear"


@dataclasses.dataclass(frozen=True)
class Card:
    """What a weights file says about itself.

    Attributes:
        model: Name for ``timm.create_model``.
        model_kwargs: Its constructor arguments.
        num_classes: Width of the classifier.
        in_chans: Input channels.
        data_config: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``,
            ``crop_mode``.
        image_mode: PIL mode of the input images.
        class_names: In label order, where known.
        dataset: Name of the data set, if it was not a folder.
        epoch: Epochs trained, counted from 1.
        metric: Name and value of the held-out metric.
        weights: ``model`` or ``ema`` (the moving average).
    """

    model: str
    model_kwargs: dict[str, Any]
    num_classes: int
    in_chans: int
    data_config: dict[str, Any]
    image_mode: str
    class_names: list[str] | None = None
    dataset: str | None = None
    epoch: int = 0
    metric: dict[str, float] = dataclasses.field(default_factory=dict)
    weights: str = "model"


def write_atomically(path: Path, write: Callable[[Path], object], keep: Path | None = None) -> None:
    """Calls ``write`` on a temporary neighbour of ``path``, syncs it and renames it to ``path``.

    Args:
        path: The file.
        write: Writes the file that it is given.
        keep: New name of the file that is replaced.

    Raises:
        UserError: The file cannot be written; the one that was there is.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        refused = _os_error(error)
        if refused is not None:
            earlier = "; what was there before is kept" if path.exists() else ""
            raise UserError(
                f"cannot write {path}: {refused.strerror or refused}{earlier}"
            ) from error
        raise
    if os.name == "posix":  # the rename itself survives a power cut once its folder is synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _os_error(error: BaseException | None) -> OSError | None:
    """Returns the system's refusal behind an error: torch.save wraps it in one of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def check_parent(path: str | None) -> None:
    """Raises `UserError` if a file that is to hold results has no folder to go to."""
    if path and not Path(path).expanduser().parent.is_dir():
        raise UserError(f"cannot write {path}: its folder does not exist")


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_weights(
    path: Path,
    state_dict: Mapping[str, torch.Tensor],
    card: Card,
    more: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors, card and more metadata to a safetensors file."""
    # clone: safetensors refuses tensors that share memory
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state_dict.items()
    }
    text = json.dumps(dataclasses.asdict(card), sort_keys=True)
    metadata = {**(more or {}), "format": "pt", CARD_KEY: text}
    # Through bytes: the library's own writer makes files that only their owner can read.
    data = safetensors.torch.save(tensors, metadata=metadata)
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def read_card(path: Path) -> Card | None:
    """Returns the card of a weights file, None if it is another program's.

    Raises:
        UserError: The file is missing, or is a damaged safetensors file.
    """
    return card_of(read_metadata(path), path)


def card_of(metadata: Mapping[str, str], path: Path) -> Card | None:
    """Returns the card in the metadata of a weights file, None if there is none.

    Raises:
        UserError: It is not understood.
    """
    text = metadata.get(CARD_KEY)
    try:
        return Card(**json.loads(text)) if text else None
    except (ValueError, TypeError) as error:
        raise UserError(
            f"checkpoint {path} describes itself in a way that this version cannot read "
            f"({one_line(error)[:200]})"
        ) from error


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of any checkpoint: safetensors, .pth, .bin.

    Raises:
        UserError: As `read_checkpoint`; or there are no tensors in it.
    """
    try:
        return unwrap_state_dict(read_checkpoint(path))
    except CheckpointError:
        raise
    except ValueError as error:
        raise UserError(f"checkpoint {path} cannot be used: {error}") from error


def named_for(
    model: nn.Module, weights: dict[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    """Returns weights under the names of ``model``; those of the authors are translated."""
    try:
        return checkpoint_filter_fn(weights, model)
    except ValueError as error:
        raise UserError(f"checkpoint {path} cannot be used: {error}") from error


def misfit(own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> str | None:
    """Returns how the names and shapes of weights differ from a model's own, if they do."""
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    wrong = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if not (missing or extra or wrong):
        return None
    example = (
        f"{wrong[0]} is {tuple(weights[wrong[0]].shape)}, not {tuple(own[wrong[0]].shape)}"
        if wrong
        else f"no {missing[0]}"
        if missing
        else f"unexpected {extra[0]}"
    )
    counts = f"{len(missing)} missing, {len(extra)} unexpected, {len(wrong)} of another shape"
    return f"{example} ({counts})"


def load_into(model: nn.Module, weights: dict[str, torch.Tensor], path: Path, name: str) -> None:
    """Loads a state dict strictly.

    Raises:
        UserError: The names or shapes are another model's.
    """
    difference = misfit(model.state_dict(), weights)
    if difference:
        raise UserError(
            f"checkpoint {path} does not fit {name}: {difference}; give the --model and "
            "--model-kwargs it was made with"
        )
    model.load_state_dict(weights)


def load_model(
    path: str | Path,
    *,
    model: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | None = None,
    input_size: list[int] | None = None,
) -> tuple[nn.Module, Card | None]:
    """Builds the model of a checkpoint and loads it.

    Args:
        path: A weights file: ours, which needs no more, or one that timm can read.
        model: Model name; for our files, must agree with the card.
        model_kwargs: Constructor arguments, for other files only.
        num_classes: For other files; must agree with the card.
        in_chans: Likewise.
        img_size: Input size, for models that are built for one.
        input_size: Likewise, with channels.

    Returns:
        The model on the CPU in eval mode, and the card if the file has one.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"checkpoint {path} is a folder: give a file, such as {path / BEST}")
    card = read_card(path)
    sizes = {"img_size": img_size, "input_size": input_size}
    if card is None:
        if path.name.endswith("_state.pt"):
            raise UserError(
                f"{path} is training state (for --resume); give best.safetensors or "
                "last.safetensors beside it"
            )
        if model is None:
            raise UserError(f"checkpoint {path} does not say which model it is: give --model")
        check_model_name(model)
        weights = read_weights(path)
        built = build_model(
            model, num_classes=num_classes, in_chans=in_chans, **{**sizes, **(model_kwargs or {})}
        )
    else:
        if model is not None and model != card.model:
            raise UserError(
                f"checkpoint {path} is of {card.model}, not {model}; "
                "give that model, or another file"
            )
        if model_kwargs:
            raise UserError(f"checkpoint {path} knows its own model: leave --model-kwargs out")
        for flag, wanted, has in (
            ("--num-classes", num_classes, card.num_classes),
            ("--in-chans", in_chans, card.in_chans),
        ):
            if wanted is not None and wanted != has:
                raise UserError(f"checkpoint {path} has {flag} {has}, not {wanted}: leave it out")
        weights = read_weights(path)
        built = build_model(
            card.model, **card.model_kwargs, num_classes=card.num_classes, in_chans=card.in_chans
        )
    name = model or (card.model if card else "")
    if card is None:  # ours fit as they are: the model is built as it was when they were written
        weights = named_for(built, weights, path)
    load_into(built, weights, path, name)
    return built.eval(), card


def initial_weights(
    model: nn.Module, path: str | Path, name: str, head_map: str | Path | None = None
) -> bool:
    """Starts a model from a checkpoint; a classifier of another width stays as it is.

    So does all that follows the stages, if the checkpoint is a detector's or segmentor's.

    Args:
        model: The model to start.
        path: The checkpoint.
        name: The model that it must be of.
        head_map: File that names a class of the checkpoint for each class of the model, whose
            part of the classifier it takes; see `read_head_map`.

    Returns:
        Whether the classifier was left out.
    """
    path = Path(path)
    card = read_card(path)
    if card is not None and card.model != name:
        raise UserError(
            f"checkpoint {path} is of {card.model}, not {name}: give its --model, or say that "
            f"it starts from another with --initial-model {card.model}"
        )
    read, own = read_weights(path), model.state_dict()
    weights = named_for(model, read, path)
    heads = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    head_keys = [key for key in own if prefixes and key.startswith(prefixes)]
    if head_map is not None:
        if not weights.keys() >= set(head_keys):
            raise UserError(f"checkpoint {path} has no classifier for --initial-head-map to read")
        rows = read_head_map(head_map, model.num_classes)  # type: ignore[arg-type]
        for key in head_keys:
            weights[key] = remapped(weights[key], rows, path).reshape(own[key].shape)
    if is_detector(read):
        parts = {key.partition(".")[0] for key in weights}
        weights = {k: v for k, v in own.items() if k.partition(".")[0] not in parts} | weights
    new_head = is_detector(read) or any(
        key in weights and weights[key].shape != own[key].shape for key in head_keys
    )
    if new_head:
        weights = {**weights, **{key: own[key] for key in head_keys}}
    load_into(model, weights, path, name)
    return new_head
