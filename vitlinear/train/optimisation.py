"""Optimiser, learning rates and averaging, by timm's factories, out of parsed flags.

Rates are published for a number of images per update. Where a flag says which, they are scaled to
the run's own: batch x accumulated steps x processes.
"""

import argparse
import fnmatch
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    optimizer_kwargs,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vitlinear.errors import UserError, one_line


def global_batch_size(args: argparse.Namespace, world_size: int) -> int:
    """Returns the number of images behind one update."""
    return int(args.batch_size * args.grad_accum_steps * world_size)


def _scale(args: argparse.Namespace, world_size: int) -> float:
    ratio = global_batch_size(args, world_size) / args.lr_base_size
    return math.sqrt(ratio) if args.lr_base_scale == "sqrt" else ratio


def learning_rate(args: argparse.Namespace, world_size: int) -> float:
    """Returns ``--lr``, or ``--lr-base`` scaled from ``--lr-base-size`` to the global batch."""
    if args.lr is not None:
        return float(args.lr)
    return float(args.lr_base * _scale(args, world_size))


def warmup_and_min_rate(args: argparse.Namespace, world_size: int) -> tuple[float, float]:
    """Returns the first and the last learning rate; with ``--lr-base-all`` these are scaled too."""
    scale = _scale(args, world_size) if args.lr_base_all else 1.0
    return float(args.warmup_lr * scale), float(args.min_lr * scale)


def ema_decay(args: argparse.Namespace, world_size: int) -> float:
    """Returns the decay of the weights' average for one update.

    With ``--model-ema-base-size`` n, ``--model-ema-decay`` is for n images: the average then
    forgets at the same speed per image whatever the global batch B, decay^(B/n).
    """
    if args.model_ema_base_size is None:
        return float(args.model_ema_decay)
    images = global_batch_size(args, world_size)
    return float(args.model_ema_decay ** (images / args.model_ema_base_size))


def batch_size_note(args: argparse.Namespace, world_size: int) -> str | None:
    """Returns a line for the user where the global batch is not the recipe's, else None."""
    images = global_batch_size(args, world_size)
    if args.recipe_batch_size in (None, images):
        return None
    peak, last = learning_rate(args, world_size), warmup_and_min_rate(args, world_size)[1]
    how = (
        "as it is, --lr; scale it yourself"
        if args.lr is not None
        else f"{args.lr_base_scale} scaling of {args.lr_base:g} per {args.lr_base_size} images"
    )
    rising = f"; the last is {last:g}, above it: lower --min-lr" if last > peak else ""
    return (
        f"global batch {images} (--batch-size {args.batch_size} x --grad-accum-steps "
        f"{args.grad_accum_steps} x {world_size} process(es)), the recipe's is "
        f"{args.recipe_batch_size}: peak learning rate {peak:g} ({how}){rising}"
    )


def undecayed_names(model: nn.Module, decayed_1d: Sequence[str]) -> set[str]:
    """Returns the parameters that weight decay leaves alone.

    timm's rule: those of one axis, biases, and what ``model.no_weight_decay()`` lists; but for
    those of one axis that ``decayed_1d`` names.

    Args:
        model: The model.
        decayed_1d: Patterns of names as in a shell: ``*.gamma``.

    Raises:
        UserError: A pattern fits no parameter of one axis.
    """
    listed: set[str] = getattr(model, "no_weight_decay", set)()
    parameters = dict(model.named_parameters())
    names = {name for name, p in parameters.items() if p.ndim <= 1 or name.endswith(".bias")}
    for pattern in decayed_1d:
        fitting = fnmatch.filter([name for name in names if parameters[name].ndim <= 1], pattern)
        if not fitting:
            raise UserError(
                f"--weight-decay-1d {pattern} fits no parameter of one axis: leave it out, or give "
                "the flag without a pattern where a --config sets it"
            )
        names.difference_update(fitting)
    return names | {
        name for name in parameters if any(fnmatch.fnmatch(name, entry) for entry in listed)
    }


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Builds a timm optimiser."""
    flags = argparse.Namespace(**{**vars(args), "lr": learning_rate(args, args.world_size)})
    kwargs: dict[str, Any] = {**optimizer_kwargs(flags), **args.opt_kwargs}
    if args.weight_decay_1d:
        groups = {
            "weight_decay": kwargs["weight_decay"],
            "weight_decay_exclude_1d": False,
            "no_weight_decay_list": undecayed_names(model, args.weight_decay_1d),
        }
        group_fn: Any = param_groups_weight_decay
        if args.layer_decay is not None:
            group_fn, groups["layer_decay"] = param_groups_layer_decay, args.layer_decay
        kwargs["param_group_fn"] = partial(group_fn, **groups)
    try:
        return create_optimizer_v2(model, **kwargs)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"--opt {args.opt}: {one_line(error)}") from error


def make_schedule(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates: int
) -> tuple[Scheduler | None, int]:
    """Builds a timm schedule; returns it with the number of epochs, cool-down included."""
    if args.sched == "plateau":
        raise UserError("--sched plateau is deprecated in timm and not offered: use cosine")
    first, last = warmup_and_min_rate(args, args.world_size)
    flags = argparse.Namespace(**{**vars(args), "warmup_lr": first, "min_lr": last})
    try:
        scheduler, epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(flags), updates_per_epoch=updates
        )
    except (ValueError, AssertionError) as error:
        raise UserError(f"--sched {args.sched}: {one_line(error)}") from error
    return scheduler, int(epochs)
