"""The model that is evaluated: of a checkpoint, or by its name."""

from torch import nn

from vitlinear.checkpoints.card import Card
from vitlinear.checkpoints.load import load_model
from vitlinear.cli.model_flags import InputConfig, ModelConfig
from vitlinear.create import (
    Preprocessing,
    build_model,
    check_model_kwargs,
    check_model_name,
    data_config,
)
from vitlinear.errors import UserError


def load_or_build(
    checkpoint: str | None, model: ModelConfig, input: InputConfig
) -> tuple[nn.Module, Card | None, Preprocessing]:
    """Returns a model in eval mode, its card if it has one, and how its images are made.

    Args:
        checkpoint: File of its weights, or None.
        model: The model; a checkpoint of ours knows its own.
        input: Goes over what the card says, and that over the model's own.

    Returns:
        The model, the card, and how images become its input.

    Raises:
        UserError: There are no weights, or checkpoint and flags contradict each other.
    """
    check_model_kwargs(model.model_kwargs)
    if checkpoint:
        if model.pretrained:
            raise UserError("--pretrained and --checkpoint exclude each other")
        built, card = load_model(
            checkpoint,
            model=model.model,
            model_kwargs=dict(model.model_kwargs),
            num_classes=model.num_classes,
            in_chans=input.channels,
            **input.sizes(),
        )
    else:
        if not model.pretrained:
            raise UserError("no weights: give --checkpoint FILE, or --model NAME --pretrained")
        card = None
        name = check_model_name(model.model)
        built = build_model(
            name,
            pretrained=True,
            num_classes=model.num_classes,
            in_chans=input.channels,
            sizes=input.sizes(),
            **model.model_kwargs,
        ).eval()
        known = built.pretrained_cfg.get("num_classes")  # type: ignore[union-attr, operator]
        if model.num_classes not in (None, known):
            raise UserError(
                f"the published weights of {name} have {known} classes, not {model.num_classes}: "
                "leave --num-classes out"
            )
    asked = {**input.given(), "model_kwargs": model.model_kwargs}
    if card is None:
        return built, None, data_config(built, asked)
    trained = card.data_config.as_dict()
    if "img_size" in asked or "input_size" in asked:
        del trained["input_size"]
    return built, card, data_config(built, {**trained, **asked})
