"""Loading of a weights file into the model that it is of.

Files of this package name their model in a card. Of other files the caller names it.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.layers import to_2tuple
from torch import Tensor, nn

from vitlinear.create import build_model, check_model_name
from vitlinear.errors import Notice, UserError

from .card import Card, read_card
from .read import CheckpointError, read_checkpoint
from .translate import checkpoint_filter_fn, classifiers, first_convolutions
from .unwrap import unwrap_state_dict


class MisfitError(UserError):
    """Weights that are another model's.

    Attributes:
        difference: In names and shapes.
    """

    def __init__(self, difference: str, remedy: str) -> None:
        super().__init__(f"{difference}; {remedy}")
        self.difference = difference


def load(path: str | Path, **kwargs: Any) -> nn.Module:
    """The model of a weights file, as it was trained, in eval mode.

    Its ``pretrained_cfg`` says how its images are made and, as ``label_names``, what its classes
    are called, where the file knows. So timm's functions do right with it:
    ``create_transform(**resolve_model_data_config(model))``, ``save_for_hf(model, folder)``.

    Args:
        path: A file that `vitlinear train`, `convert` or `export` wrote. Any other file of weights
            does not name its model.
        **kwargs: For such files, as `load_model` takes them: ``model="ravlt_t"``,
            ``num_classes=10``.

    Raises:
        UserError: The file is missing or damaged, an argument contradicts it, or it does not fit.
    """
    return load_model(path, **kwargs)[0]


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
    """Build the model of a weights file and load it.

    Args:
        path: A weights file: ours, which needs no more, or one that timm can read.
        model: Model name; for our files, must agree with the card.
        model_kwargs: Constructor arguments, for other files only.
        num_classes: For other files; must agree with the card.
        in_chans: For other files; must agree with the card.
        img_size: Side of the images, for other files whose models are built for one.
        input_size: Channels, height and width, for the same models.

    Returns:
        The model on the CPU in eval mode, and the card if the file has one.

    Raises:
        UserError: The file is missing or damaged, an argument contradicts it, or it does not fit.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"checkpoint {path} is a folder: give a file, such as {path / 'best.safetensors'}"
        )
    card = read_card(path)
    if card is None:
        name = _named_model(path, model)
        weights = read_weights(path)
        built = build_model(
            name,
            sizes={"img_size": img_size, "input_size": input_size},
            num_classes=num_classes,
            in_chans=in_chans,
            **(model_kwargs or {}),
        )
        weights = named_for(built, weights, path, card)
    else:
        name = card.model
        _check_agreement(path, card, model, model_kwargs, num_classes, in_chans)
        weights = read_weights(path)
        # They fit as they are: the model is built as it was when they were written.
        built = build_model(
            name,
            pretrained_cfg_overlay={"file": str(path), **card.pretrained_cfg()},
            **card.model_kwargs,
            num_classes=card.num_classes,
            in_chans=card.in_chans,
        )
    load_into(built, weights, path, name)
    return built.eval(), card


def _named_model(path: Path, model: str | None) -> str:
    """The model that the caller names for a file without a card.

    Raises:
        UserError: None is named, or there is no such model.
    """
    if path.name.endswith("_state.pt"):
        raise UserError(
            f"{path} is training state (for --resume); give best.safetensors or "
            "last.safetensors beside it"
        )
    if model is None:
        raise UserError(f"checkpoint {path} does not say which model it is: give --model")
    check_model_name(model)
    return model


def same_model(first: str, second: str) -> bool:
    """Whether two names are of one model; tags are of weights, and say nothing about it."""
    return first.partition(".")[0] == second.partition(".")[0]


def _check_agreement(
    path: Path,
    card: Card,
    model: str | None,
    model_kwargs: dict[str, Any] | None,
    num_classes: int | None,
    in_chans: int | None,
) -> None:
    """Raise `UserError` for arguments of `load_model` that contradict the card of the file."""
    if model is not None and not same_model(model, card.model):
        raise UserError(
            f"checkpoint {path} is of {card.model}, not {model}; give that model, or another file"
        )
    if model_kwargs:
        raise UserError(f"checkpoint {path} knows its own model: leave --model-kwargs out")
    for flag, wanted, has in (
        ("--num-classes", num_classes, card.num_classes),
        ("--in-chans", in_chans, card.in_chans),
    ):
        if wanted is not None and wanted != has:
            raise UserError(f"checkpoint {path} has {flag} {has}, not {wanted}: leave it out")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of any checkpoint: safetensors, .pth, .bin.

    Raises:
        CheckpointError: As `read_checkpoint`; or there are no tensors in it.
    """
    checkpoint = read_checkpoint(path)
    try:
        return unwrap_state_dict(checkpoint)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} cannot be used: {error}") from error


def named_for(
    model: nn.Module, weights: dict[str, Tensor], path: Path, card: Card | None
) -> dict[str, Tensor]:
    """Bring weights under the names of a model; those of the authors are translated.

    Args:
        model: The model.
        weights: As `read_weights` returns them.
        path: Their file.
        card: What it says of itself, if it does.

    Raises:
        CheckpointError: None of them is a weight of the model.
    """
    size = None if card is None else card.model_kwargs.get("img_size")
    try:
        return checkpoint_filter_fn(weights, model, size)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} cannot be used: {error}") from error


def notice_of_other_model(path: Path, card: Card, name: str, arguments: Mapping[str, Any]) -> None:
    """Give a `Notice` where weights are for another model than the one that they were trained as.

    Their shapes may fit all the same.

    Args:
        path: The file.
        card: What it says of itself.
        name: Of the model, without a tag.
        arguments: Of its constructor, those of the card among them if they were given.
    """
    other = [] if same_model(card.model, name) else [f"model {card.model}"]
    other += [
        f"{key}={trained}"
        for key, trained in card.model_kwargs.items()
        if key != "attn_backend" and _plain(key, arguments.get(key)) != _plain(key, trained)
    ]
    if other:
        warnings.warn(
            f"checkpoint {path} is of {', '.join(other)}, and {name} is built otherwise here: "
            "vitlinear.load makes the model as it was trained",
            Notice,
            stacklevel=2,
        )


def _plain(key: str, value: Any) -> str:
    """An argument as JSON, whichever way it was given."""
    return json.dumps(to_2tuple(value) if key == "img_size" else value, default=str)


def load_into(model: nn.Module, weights: dict[str, Tensor], path: Path, name: str) -> None:
    """Load a state dict strictly.

    Args:
        model: The model to load into.
        weights: Under its names.
        path: Where they are from, for the message.
        name: Of the model, for the message.

    Raises:
        MisfitError: The names or shapes are another model's.
    """
    difference = misfit(model.state_dict(), weights)
    if difference:
        raise MisfitError(
            f"checkpoint {path} does not fit {name}: {difference}", _remedy(model, weights)
        )
    model.load_state_dict(weights)


def _remedy(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Tell which flags make a model that weights would fit."""
    own = model.state_dict()
    if own.keys() == weights.keys():
        wrong = [key for key, value in own.items() if value.shape != weights[key].shape]
        parts = {key.rpartition(".")[0] for key in wrong}
        if parts <= set(classifiers(model)):
            return f"give --num-classes {len(weights[wrong[0]])}"
        if parts <= set(first_convolutions(model)):
            return f"give --in-chans {weights[wrong[0]].shape[1]}"
    return "give the --model and --model-kwargs it was made with"


def misfit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str | None:
    """Tell in words how weights differ from a model's own in names and shapes; None if not."""
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
