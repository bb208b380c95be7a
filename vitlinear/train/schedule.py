"""How long a run trains and at which learning rates, by timm's schedules.

Rates are published for a number of images per update. Where a flag says which, they are scaled to
the run's own: batch x accumulated steps x processes.
"""

import dataclasses
import math
from argparse import ArgumentTypeError, BooleanOptionalAction
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler

from vitlinear.cli.flags import COUNT, NATURAL, POSITIVE, RATE
from vitlinear.cli.parser import Instead, Parser
from vitlinear.errors import UserError, one_line, unknown_choice

SCHEDULES = ("cosine", "tanh", "step", "multistep", "constant", "poly", "wsd", "rsqrt")


@dataclass(frozen=True)
class ScheduleConfig:
    """Length and learning rates of a run; the defaults are the published families' common recipe.

    Epochs count passes over the data, rates are those of timm's schedules.
    """

    epochs: int
    stop_epoch: int | None
    batch_size: int
    lr: float | None
    lr_base: float
    lr_base_size: int
    lr_base_scale: str
    lr_base_all: bool
    recipe_batch_size: int | None
    sched: str
    sched_on_updates: bool
    warmup_epochs: float
    warmup_lr: float
    warmup_prefix: bool
    cooldown_epochs: int
    min_lr: float
    decay_epochs: float | None
    decay_milestones: tuple[int, ...]
    decay_rate: float | None

    def images_per_update(self, accumulate: int, world_size: int) -> int:
        """Returns the number of images behind one update: the global batch.

        Args:
            accumulate: Batches per update.
            world_size: Number of processes that share the data.
        """
        return self.batch_size * accumulate * world_size


def add_schedule_flags(parser: Parser) -> None:
    """Adds the flags of `ScheduleConfig`."""
    group = parser.group("schedule")
    group.add_argument("--epochs", type=COUNT, default=300, help="length of the schedule")
    group.add_argument(
        "--stop-epoch", type=COUNT, default=None, metavar="N", help="end early, same schedule"
    )
    group.add_argument("-b", "--batch-size", type=COUNT, default=128, help="per process and step")
    peak = group.add_mutually_exclusive_group()
    peak.add_argument(
        "--lr", type=RATE, default=None, help="absolute; goes over the --lr-base of a --config"
    )
    peak.add_argument(
        "--lr-base",
        type=RATE,
        default=5e-4,
        action=Instead,
        instead_of="lr",
        help="for --lr-base-size images; goes over the --lr of a --config",
    )
    group.add_argument(
        "--lr-base-size", type=COUNT, default=512, help="images per update that --lr-base is for"
    )
    group.add_argument(
        "--lr-base-scale",
        default="linear",
        choices=("linear", "sqrt"),
        help="how it follows their number",
    )
    group.add_argument(
        "--lr-base-all",
        action=BooleanOptionalAction,
        default=False,
        help="scale --warmup-lr and --min-lr from --lr-base-size too",
    )
    group.add_argument(
        "--recipe-batch-size",
        type=COUNT,
        default=None,
        metavar="N",
        help="images per update the rates were chosen for; a run with another number says so",
    )
    group.add_argument(
        "--sched",
        type=_schedule,
        default="cosine",
        metavar="NAME",
        help=f"{', '.join(SCHEDULES)}; constant: --lr throughout",
    )
    group.add_argument(
        "--sched-on-updates",
        action=BooleanOptionalAction,
        default=False,
        help="new rate at each update, not each epoch",
    )
    group.add_argument(
        "--warmup-epochs", type=RATE, default=5, metavar="N", help="from --warmup-lr up"
    )
    group.add_argument("--warmup-lr", type=RATE, default=1e-6, help="first rate")
    group.add_argument(
        "--warmup-prefix",
        action=BooleanOptionalAction,
        default=False,
        help="the schedule starts after the warm-up, not below it",
    )
    group.add_argument(
        "--cooldown-epochs", type=NATURAL, default=0, help="after --epochs, at --min-lr"
    )
    group.add_argument("--min-lr", type=RATE, default=1e-5, help="last rate")
    group.add_argument(
        "--decay-epochs",
        type=POSITIVE,
        default=None,
        metavar="N",
        help="of --sched step: between steps (default: 90); of wsd and rsqrt: of the decay at the "
        "end, or its part of the schedule if below 1 (default: 0.2)",
    )
    group.add_argument(
        "--decay-milestones",
        type=COUNT,
        nargs="+",
        default=[90, 180, 270],
        help="with --sched multistep",
    )
    group.add_argument(
        "--decay-rate",
        type=RATE,
        default=None,
        metavar="X",
        help="of --sched step and multistep: factor of a step (default: 0.1); of poly: power "
        "(default: 1)",
    )
    for flag, option in (("lr_base_size", "--lr-base-size"), ("lr_base_scale", "--lr-base-scale")):
        what = f"--lr is absolute: give --lr-base instead of it, or leave {option} out"
        parser.needs(flag, "lr_base_all", beside="lr", instead=what)
    parser.needs("warmup_lr", "warmup_epochs")
    parser.needs("min_lr", "sched", values=("cosine", "tanh", "poly", "wsd", "rsqrt"))
    parser.needs("decay_epochs", "sched", values=("step", "wsd", "rsqrt"))
    parser.needs("decay_milestones", "sched", values=("multistep",))
    parser.needs("decay_rate", "sched", values=("step", "multistep", "poly"))


def _schedule(name: str) -> str:
    """Returns the name of a schedule; an argparse type."""
    if name == "plateau":
        raise ArgumentTypeError("plateau is deprecated in timm and not offered: use cosine")
    if name == "none":  # timm's schedules are what applies both
        raise ArgumentTypeError(
            "none would leave --warmup-epochs and --layer-decay out without a word: use "
            "--sched constant, which applies them (--warmup-epochs 0 for no warm-up)"
        )
    if name not in SCHEDULES:
        raise ArgumentTypeError(unknown_choice("schedule", name, SCHEDULES))
    return name


def learning_rate(config: ScheduleConfig, images: int) -> float:
    """Returns the peak learning rate.

    ``lr`` as it is, or else ``lr_base`` scaled from ``lr_base_size`` to the images of an update.
    """
    if config.lr is not None:
        return config.lr
    return config.lr_base * _scale(config, images)


def warmup_and_min_rate(config: ScheduleConfig, images: int) -> tuple[float, float]:
    """Returns the first and the last learning rate; with ``lr_base_all`` these are scaled too."""
    scale = _scale(config, images) if config.lr_base_all else 1.0
    return config.warmup_lr * scale, config.min_lr * scale


def _scale(config: ScheduleConfig, images: int) -> float:
    ratio = images / config.lr_base_size
    return math.sqrt(ratio) if config.lr_base_scale == "sqrt" else ratio


def batch_size_note(
    config: ScheduleConfig, accumulate: int, world_size: int, rows: int = 1
) -> str | None:
    """Returns a line for the user where the global batch is not the recipe's, else None.

    Args:
        config: Batch and rates.
        accumulate: Batches per update.
        world_size: Number of processes, or groups of them, that share the data.
        rows: Number of processes that share an image.
    """
    images = config.images_per_update(accumulate, world_size)
    if config.recipe_batch_size in (None, images):
        return None
    how = (
        "as it is, --lr; scale it yourself"
        if config.lr is not None
        else f"{config.lr_base_scale} scaling of {config.lr_base:g} per "
        f"{config.lr_base_size} images"
    )
    return (
        f"global batch {images} (--batch-size {config.batch_size} x --grad-accum-steps "
        f"{accumulate} x {world_size} {'process(es)' if rows == 1 else f'group(s) of {rows}'}), "
        "the recipe's is "
        f"{config.recipe_batch_size}: peak learning rate {learning_rate(config, images):g} ({how})"
    )


def shape_notes(config: ScheduleConfig, images: int) -> list[str]:
    """Returns lines for the user where the rate does not rise to its peak and fall from there.

    Args:
        config: Rates and lengths.
        images: Behind an update.
    """
    peak, (first, last) = learning_rate(config, images), warmup_and_min_rate(config, images)
    notes = []
    if first > peak and config.warmup_epochs:
        notes.append(
            f"the first learning rate {first:g} is above the peak {peak:g}: lower --warmup-lr"
        )
    if last > peak and config.sched not in ("step", "multistep", "constant"):
        notes.append(f"the last learning rate {last:g} is above the peak {peak:g}: lower --min-lr")
    if config.warmup_epochs >= config.epochs and not config.warmup_prefix:
        notes.append(
            f"--warmup-epochs {config.warmup_epochs:g} of --epochs {config.epochs} do not reach "
            f"the peak learning rate {peak:g}: lower --warmup-epochs, or give --warmup-prefix"
        )
    step = {"step": config.decay_epochs or 90, "multistep": min(config.decay_milestones) - 1}
    if step.get(config.sched, 0) >= config.epochs:
        flag = "--decay-epochs" if config.sched == "step" else "--decay-milestones"
        notes.append(
            f"--sched {config.sched} makes no step in --epochs {config.epochs}: lower {flag}"
        )
    return notes


def make_schedule(
    config: ScheduleConfig, optimizer: torch.optim.Optimizer, updates: int, images: int
) -> tuple[Scheduler | None, int]:
    """Builds a timm schedule.

    Args:
        config: What it is to do.
        optimizer: Whose learning rates it sets; they are at the peak.
        updates: Optimiser updates in an epoch.
        images: Behind an update.

    Returns:
        The schedule, and the number of epochs with the cool-down.

    Raises:
        UserError: The schedule does not take these values.
    """
    first, last = warmup_and_min_rate(config, images)
    flags = dataclasses.asdict(config) | {"warmup_lr": first, "min_lr": last}
    if config.decay_rate is None:  # timm's default for steps is no power of a polynomial
        flags["decay_rate"] = 1.0 if config.sched == "poly" else 0.1
    try:
        scheduler, epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(SimpleNamespace(**flags)), updates_per_epoch=updates
        )
    except (ValueError, AssertionError) as error:
        raise UserError(f"--sched {config.sched}: {one_line(error)}") from error
    if config.cooldown_epochs and not hasattr(scheduler, "get_cycle_length"):  # as timm asks
        raise UserError(
            f"--sched {config.sched} has no cool-down: leave --cooldown-epochs "
            f"{config.cooldown_epochs} out, or give more --epochs"
        )
    return scheduler, int(epochs)


def set_schedule(scheduler: Scheduler, epoch: int, updates: int) -> None:
    """Sets the learning rate of a position; only the call that matches its unit acts."""
    scheduler.step(epoch)
    scheduler.step_update(updates)
