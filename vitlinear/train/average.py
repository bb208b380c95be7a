"""The moving average of the weights."""

from argparse import BooleanOptionalAction
from dataclasses import dataclass

from timm.task import TrainingTask

from vitlinear.cli.flags import COUNT, PROBABILITY
from vitlinear.cli.parser import Parser


@dataclass(frozen=True)
class AverageConfig:
    """Whether the weights are averaged, and how fast the average forgets."""

    model_ema: bool
    model_ema_decay: float
    model_ema_base_size: int | None
    model_ema_warmup: bool


def add_average_flags(parser: Parser) -> None:
    """Adds the flags of `AverageConfig`."""
    group = parser.group("average of the weights")
    group.add_argument(
        "--model-ema",
        action=BooleanOptionalAction,
        default=False,
        help="average the weights, and evaluate the average",
    )
    group.add_argument("--model-ema-decay", type=PROBABILITY, default=0.9998, help="for one update")
    group.add_argument(
        "--model-ema-base-size",
        type=COUNT,
        default=None,
        metavar="N",
        help="images that --model-ema-decay is for; default: those of an update",
    )
    group.add_argument(
        "--model-ema-warmup",
        action=BooleanOptionalAction,
        default=False,
        help="let the decay rise to its value",
    )
    for flag in ("model_ema_decay", "model_ema_base_size", "model_ema_warmup"):
        parser.needs(flag, "model_ema")


def ema_decay(config: AverageConfig, images: int) -> float:
    """Returns the decay of the average for one update of so many images.

    With ``model_ema_base_size`` n, ``model_ema_decay`` is for n images: the average then forgets
    at the same speed per image whatever the global batch B, decay^(B/n).
    """
    if config.model_ema_base_size is None:
        return config.model_ema_decay
    return config.model_ema_decay ** (images / config.model_ema_base_size)


def add_average(task: TrainingTask, config: AverageConfig, images: int, foreach: bool) -> None:
    """Adds the average to a task, if there is to be one.

    Args:
        task: Holds the model.
        config: What is asked for.
        images: Behind an update.
        foreach: Whether many tensors may be updated by one operation.
    """
    if config.model_ema:
        task.setup_ema(
            decay=ema_decay(config, images),
            use_warmup=config.model_ema_warmup,
            foreach=foreach,
        )
