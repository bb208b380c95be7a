"""The optimiser: timm's factory, and which parameters are decayed."""

import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import nn

from vitlinear.cli.flags import COUNT, RATE
from vitlinear.cli.parser import KeyValues, Parser
from vitlinear.errors import Notice, UserError, one_line


@dataclass(frozen=True)
class OptimiserConfig:
    """How an update is made of gradients; the learning rate is the schedule's."""

    opt: str
    opt_eps: float | None
    opt_betas: tuple[float, ...] | None
    opt_kwargs: Mapping[str, Any]
    momentum: float
    weight_decay: float
    weight_decay_1d: tuple[str, ...]
    layer_decay: float | None
    clip_grad: float | None
    clip_mode: str
    grad_accum_steps: int


def add_optimiser_flags(parser: Parser) -> None:
    """Adds the flags of `OptimiserConfig`."""
    group = parser.group("optimiser")
    group.add_argument("--opt", default="adamw", metavar="NAME", help="any timm optimiser")
    group.add_argument(
        "--opt-eps", type=RATE, default=None, metavar="E", help="epsilon (default: the optimiser's)"
    )
    group.add_argument(
        "--opt-betas",
        type=RATE,
        nargs="+",
        default=None,
        metavar="B",
        help="(default: the optimiser's)",
    )
    group.add_argument(
        "--opt-kwargs",
        nargs="*",
        action=KeyValues,
        default={},
        metavar="K=V",
        help="more arguments of the optimiser",
    )
    group.add_argument("--momentum", type=RATE, default=0.9, help="of optimisers that have one")
    group.add_argument(
        "--weight-decay", type=RATE, default=0.05, help="not of biases and parameters of one axis"
    )
    group.add_argument(
        "--weight-decay-1d",
        nargs="*",
        default=[],
        metavar="PATTERN",
        help="decay these parameters although they have one axis: '*.gamma'",
    )
    group.add_argument(
        "--layer-decay",
        type=RATE,
        default=None,
        help="factor on the rate from each layer to the one before",
    )
    group.add_argument(
        "--clip-grad", type=RATE, default=None, metavar="X", help="bound of the gradients; 0: none"
    )
    group.add_argument(
        "--clip-mode",
        default="norm",
        choices=("norm", "value", "agc"),
        help="what is bounded: the whole norm, each value, or each norm against its weights'",
    )
    group.add_argument(
        "--grad-accum-steps", type=COUNT, default=1, metavar="N", help="batches behind an update"
    )
    parser.needs("clip_mode", "clip_grad")


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


def _note_unused(config: OptimiserConfig) -> None:
    """Says which settings an optimiser does not have; ``lookahead_`` may stand before its name."""
    info = get_optimizer_info(config.opt.lower().rpartition("_")[2])
    for flag, value, has in (
        ("betas", config.opt_betas, info.has_betas),
        ("eps", config.opt_eps, info.has_eps),
    ):
        if value is not None and not has:
            note = f"--opt {config.opt} has no {flag}: --opt-{flag} is not used"
            warnings.warn(note, Notice, 3)


def make_optimizer(config: OptimiserConfig, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Builds a timm optimiser.

    Args:
        config: What it is to do.
        model: Whose parameters it updates.
        lr: Peak learning rate.

    Raises:
        UserError: There is no such optimiser, or it does not take these arguments.
    """
    kwargs: dict[str, Any] = {
        "opt": config.opt,
        "lr": lr,
        "weight_decay": config.weight_decay,
        "momentum": config.momentum,
        "eps": config.opt_eps,
        "betas": config.opt_betas,
        "layer_decay": config.layer_decay,
    }
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    kwargs |= config.opt_kwargs
    if config.weight_decay_1d:
        groups = {
            "weight_decay": kwargs["weight_decay"],
            "weight_decay_exclude_1d": False,
            "no_weight_decay_list": undecayed_names(model, config.weight_decay_1d),
        }
        group_fn: Any = param_groups_weight_decay
        if config.layer_decay is not None:
            group_fn, groups["layer_decay"] = param_groups_layer_decay, config.layer_decay
        kwargs["param_group_fn"] = partial(group_fn, **groups)
    try:
        optimizer = create_optimizer_v2(model, **kwargs)
    except IndexError as error:
        raise UserError(f"--opt {config.opt} takes more --opt-betas than given") from error
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"--opt {config.opt}: {one_line(error)}") from error
    _note_unused(config)
    if getattr(optimizer, "is_second_order", False):
        raise UserError(
            f"--opt {config.opt} needs second derivatives, which training does not compute: give "
            "another"
        )
    return optimizer
