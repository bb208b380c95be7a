"""A checkpoint file to the model that it is of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitlinear.create import build_model, check_model_name
from vitlinear.errors import UserError

from .card import Card, read_card
from .filter import checkpoint_filter_fn
from .read import CheckpointError, read_checkpoint
from .unwrap import unwrap_state_dict


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
        raise UserError(
            f"checkpoint {path} is a folder: give a file, such as {path / 'best.safetensors'}"
        )
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
