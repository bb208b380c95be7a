"""Optimiser and learning-rate schedule, by timm's factories, out of parsed flags."""

import argparse
import math

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vitlinear.errors import UserError, one_line


def learning_rate(args: argparse.Namespace, world_size: int) -> float:
    """Returns ``--lr``, or ``--lr-base`` scaled from ``--lr-base-size`` to the global batch."""
    if args.lr is not None:
        return float(args.lr)
    ratio = args.batch_size * args.grad_accum_steps * world_size / args.lr_base_size
    return float(args.lr_base * (math.sqrt(ratio) if args.lr_base_scale == "sqrt" else ratio))


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Builds a timm optimiser."""
    flags = argparse.Namespace(**{**vars(args), "lr": learning_rate(args, args.world_size)})
    try:
        return create_optimizer_v2(model, **{**optimizer_kwargs(flags), **args.opt_kwargs})
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"--opt {args.opt}: {one_line(error)}") from error


def make_schedule(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates: int
) -> tuple[Scheduler | None, int]:
    """Builds a timm schedule; returns it with the number of epochs, cool-down included."""
    if args.sched == "plateau":
        raise UserError("--sched plateau is deprecated in timm and not offered: use cosine")
    try:
        scheduler, epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(args), updates_per_epoch=updates
        )
    except (ValueError, AssertionError) as error:
        raise UserError(f"--sched {args.sched}: {one_line(error)}") from error
    return scheduler, int(epochs)
