"""The model that is trained: by its name, with what regularises it."""

from argparse import BooleanOptionalAction
from dataclasses import dataclass
from typing import Any

from torch import nn

from vitlinear.cli.flags import PROBABILITY
from vitlinear.cli.model_flags import InputConfig, ModelConfig
from vitlinear.cli.parser import Parser
from vitlinear.create import build_model, check_model_name
from vitlinear.errors import UserError


@dataclass(frozen=True)
class RegularisationConfig:
    """Dropout rates of a model in training, and whether it computes activations twice."""

    drop: float | None
    drop_path: float | None
    grad_checkpointing: bool


def add_regularisation_flags(parser: Parser) -> None:
    """Adds the flags of `RegularisationConfig`."""
    group = parser.group("weights")
    group.add_argument(
        "--drop", type=PROBABILITY, default=None, metavar="P", help="classifier dropout"
    )
    group.add_argument(
        "--drop-path", type=PROBABILITY, default=None, metavar="P", help="stochastic depth"
    )
    group.add_argument(
        "--grad-checkpointing",
        action=BooleanOptionalAction,
        default=False,
        help="compute activations twice, for less memory",
    )


# Arguments of a constructor that are not the model's shape: no weights file needs them.
TRAINING_ONLY = ("drop_rate", "drop_path_rate")


def make_model(
    config: ModelConfig, regularisation: RegularisationConfig, input: InputConfig, num_classes: int
) -> nn.Module:
    """Builds a model to train, on the CPU.

    Args:
        config: Which model.
        regularisation: What it drops; ``model_kwargs`` go over that.
        input: Of which size.
        num_classes: Width of the classifier.

    Raises:
        UserError: There is no such model, or it does not take these arguments.
    """
    arguments: dict[str, Any] = {
        "drop_rate": regularisation.drop,
        "drop_path_rate": regularisation.drop_path,
        **config.model_kwargs,
    }
    return build_model(
        check_model_name(config.model),
        pretrained=config.pretrained,
        num_classes=num_classes,
        in_chans=input.channels,
        sizes=input.sizes(),
        **arguments,
    )


def shape_arguments(model: nn.Module) -> dict[str, Any]:
    """Returns the constructor arguments that a weights file says, beside classes and channels."""
    given = model._model_args.items()  # type: ignore[union-attr, operator]
    kept = ("num_classes", "in_chans", *TRAINING_ONLY)
    return {key: value for key, value in given if key not in kept}


def enable_checkpointing(model: nn.Module, name: str) -> None:
    """Turns gradient checkpointing on, or says that the model has none."""
    try:
        model.set_grad_checkpointing(enable=True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        raise UserError(
            f"{name} has no gradient checkpointing: drop --grad-checkpointing"
        ) from error
