"""Weights that a run starts from: whose they are, and what becomes of their classifier."""

from dataclasses import dataclass
from pathlib import Path

import torch
from timm.models import get_model_args
from torch import nn

from vitlinear.checkpoints.card import read_card
from vitlinear.checkpoints.load import (
    load_into,
    named_for,
    notice_of_other_model,
    read_weights,
    same_model,
)
from vitlinear.checkpoints.translate import classifiers, is_detector, without, wrapper_prefix
from vitlinear.cli.flags import RATE, REAL, file_name
from vitlinear.cli.parser import Parser
from vitlinear.create import Preprocessing, check_model_name
from vitlinear.errors import UserError


@dataclass(frozen=True)
class StartConfig:
    """Weights to start from, what is done to the classifier, and what is frozen."""

    initial_checkpoint: str | None
    initial_model: str | None
    initial_head_map: str | None
    head_init_scale: float | None
    head_init_bias: float | None
    freeze: tuple[str, ...]


def add_start_flags(parser: Parser) -> None:
    """Adds the flags of `StartConfig`."""
    group = parser.group("weights")
    group.add_argument(
        "--initial-checkpoint", type=file_name, default=None, metavar="FILE", help="start weights"
    )
    group.add_argument(
        "--initial-model",
        default=None,
        metavar="NAME",
        help="the model they are of, if another; with it a run must have start weights",
    )
    group.add_argument(
        "--initial-head-map",
        type=file_name,
        default=None,
        metavar="FILE",
        help="for each class, in a line, the class in the start weights whose classifier it takes",
    )
    group.add_argument(
        "--head-init-scale",
        type=RATE,
        default=None,
        metavar="X",
        help="factor on the weights of the classifier",
    )
    group.add_argument(
        "--head-init-bias", type=REAL, default=None, metavar="B", help="bias of the classifier"
    )
    group.add_argument(
        "--freeze",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="parts that are not trained: names of modules or parameters, or globs of them",
    )


def check_initial(config: StartConfig, pretrained: bool) -> None:
    """Refuses a recipe that fine-tunes without weights to start from, and flags that need some.

    Args:
        config: What is asked for.
        pretrained: Whether the model starts from its published weights.

    Raises:
        UserError: There are none, or those of another model are asked for.
    """
    if config.initial_model is None and config.initial_checkpoint and pretrained:
        raise UserError(
            f"--initial-checkpoint {config.initial_checkpoint} and --pretrained both give the "
            "start weights: leave one out"
        )
    if config.initial_model is not None:
        check_model_name(config.initial_model)
        if pretrained:
            raise UserError(
                f"this run is to start from weights of {config.initial_model}, and --pretrained "
                "fetches those of --model: give --initial-checkpoint FILE instead"
            )
        if not config.initial_checkpoint:
            raise UserError(
                f"this run is to start from weights of {config.initial_model}: "
                "give --initial-checkpoint FILE"
            )
    if config.initial_head_map is not None and not config.initial_checkpoint:
        raise UserError("--initial-head-map is for the classifier of --initial-checkpoint FILE")


def read_head_map(path: str | Path, num_classes: int) -> torch.Tensor:
    """Reads which class of the start weights each class takes its classifier from.

    Args:
        path: Text file; line i (from 0) holds the number of that class for class i.
        num_classes: Lines that there must be.

    Returns:
        [num_classes] int64.

    Raises:
        UserError: The file is missing, or does not hold that many numbers.
    """
    try:
        words = Path(path).read_text(encoding="utf-8").split()
        numbers = [int(word) for word in words]
    except OSError as error:
        raise UserError(f"cannot read --initial-head-map {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--initial-head-map {path}: needs a class number in each line") from error
    if len(numbers) != num_classes or min(numbers) < 0:
        raise UserError(
            f"--initial-head-map {path} has {len(numbers)} lines for {num_classes} classes, or a "
            "negative one: it needs the class in the start weights for each"
        )
    return torch.tensor(numbers)


def remapped(value: torch.Tensor, head_map: torch.Tensor, path: str | Path) -> torch.Tensor:
    """Returns the rows of a classifier's weight or bias that ``head_map`` names, in its order.

    Raises:
        UserError: The classifier of the start weights, ``path``, has too few classes.
    """
    if int(head_map.max()) >= len(value):
        raise UserError(
            f"--initial-head-map asks for class {int(head_map.max())}, but {path} has only "
            f"{len(value)} classes (counted from 0)"
        )
    return value[head_map]


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
    if card is not None and not same_model(card.model, name):
        raise UserError(
            f"checkpoint {path} is of {card.model}, not {name}: give its --model, or say that "
            f"it starts from another with --initial-model {card.model}"
        )
    read, own = read_weights(path), model.state_dict()
    weights = named_for(model, read, path, card)
    read = without(wrapper_prefix(read, model), read)
    prefixes = tuple(f"{head}." for head in classifiers(model))
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
    if card is not None:
        # Images of another size are an everyday reason to train on.
        arguments = {**get_model_args(model), "img_size": card.model_kwargs.get("img_size")}
        notice_of_other_model(path, card, card.model.partition(".")[0], arguments)
    return new_head


def normalisation_note(path: str | None, config: Preprocessing) -> str | None:
    """Returns a line for the user where start weights knew images of other statistics, else None.

    Args:
        path: The checkpoint, or None.
        config: How images are made in this run.
    """
    card = read_card(Path(path)) if path else None
    if card is None:
        return None
    trained = card.data_config
    if (trained.mean, trained.std) == (config.mean, config.std):
        return None
    mean, std = (" ".join(f"{x:g}" for x in values) for values in (trained.mean, trained.std))
    flags = f"--mean {mean} --std {std}"
    return f"{path}: it knows images that were normalised otherwise; to keep that, give {flags}"


def initialise_head(model: nn.Module, scale: float | None, bias: float | None) -> None:
    """Scales the weights of the classifier, and sets its bias, in place.

    Args:
        model: With timm's ``get_classifier``.
        scale: Factor, or None. Small ones keep a new head from disturbing trained features.
        bias: Value, or None. Negative ones start a sigmoid loss at few positives.

    Raises:
        UserError: The classifier has no weights, or no bias.
    """
    if scale is None and bias is None:
        return
    classifier = model.get_classifier()  # type: ignore[operator]
    layers = [part for part in classifier.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    if not layers:
        raise UserError("--head-init-scale and --head-init-bias: the model has no classifier")
    with torch.no_grad():
        for layer in layers:
            if scale is not None:
                layer.weight.mul_(scale)
            if bias is not None:
                if layer.bias is None:
                    raise UserError("--head-init-bias: the classifier has no bias")
                layer.bias.fill_(bias)
