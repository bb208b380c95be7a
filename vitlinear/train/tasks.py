"""The tasks of a step: classification, alone or with a teacher, each as one of timm's tasks.

A task maps images and targets to a loss; the loop knows nothing else of it. Teachers are frozen,
see the student's batch as it was augmented and mixed, and are in no checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn

from vitlinear.cli.flags import NATURAL, POSITIVE, RATE, file_name
from vitlinear.cli.parser import Parser
from vitlinear.create import Preprocessing
from vitlinear.errors import UserError, one_line

from .distillation import HardDistillationTask, MesaTask
from .teacher import make_teacher


@dataclass(frozen=True)
class DistillationConfig:
    """Who teaches a model beside the labels, and by which loss."""

    kd_model_name: str | None
    kd_checkpoint: str | None
    kd_distill_type: str
    kd_loss_type: str
    kd_token_distill_type: str
    kd_temperature: float
    distill_loss_weight: float | None
    task_loss_weight: float | None
    mesa: float
    mesa_start_epoch: int
    mesa_temperature: float

    @property
    def has_teacher(self) -> bool:
        """Whether another model teaches."""
        return bool(self.kd_model_name or self.kd_checkpoint)


def add_distillation_flags(parser: Parser) -> None:
    """Adds the flags of `DistillationConfig`."""
    group = parser.group("distillation")
    group.add_argument(
        "--kd-model-name", default=None, metavar="NAME", help="teacher, with its published weights"
    )
    group.add_argument(
        "--kd-checkpoint",
        type=file_name,
        default=None,
        metavar="FILE",
        help="weights of the teacher instead",
    )
    group.add_argument(
        "--kd-distill-type",
        default="logit",
        choices=("logit", "feature", "token"),
        help="what of the teacher is learnt",
    )
    group.add_argument(
        "--kd-loss-type", default="kl", choices=("kl", "hard"), help="with logit: soft or hard"
    )
    group.add_argument(
        "--kd-token-distill-type",
        default="soft",
        choices=("soft", "hard"),
        help="with token: soft or hard",
    )
    group.add_argument(
        "--kd-temperature", type=POSITIVE, default=4.0, metavar="T", help="of soft labels"
    )
    group.add_argument(
        "--distill-loss-weight", type=RATE, default=None, metavar="W", help="of the teacher's term"
    )
    group.add_argument(
        "--task-loss-weight",
        type=RATE,
        default=None,
        metavar="W",
        help="of the labels' term; alone, the teacher's is 1 - W",
    )
    group.add_argument(
        "--mesa", type=RATE, default=0.0, metavar="W", help="learn from the average of the weights"
    )
    group.add_argument(
        "--mesa-start-epoch", type=NATURAL, default=5, metavar="N", help="epochs without it"
    )
    group.add_argument(
        "--mesa-temperature",
        type=POSITIVE,
        default=1.0,
        metavar="T",
        help="likewise of soft labels",
    )
    for flag in ("kd_distill_type", "kd_loss_type", "kd_token_distill_type", "kd_temperature"):
        parser.needs(flag, "kd_model_name", "kd_checkpoint")
    parser.needs("kd_loss_type", "kd_distill_type", values=("logit",))
    parser.needs("kd_token_distill_type", "kd_distill_type", values=("token",))
    for flag in ("mesa_start_epoch", "mesa_temperature"):
        parser.needs(flag, "mesa")


def check_task(config: DistillationConfig, *, averages: bool, sharded: bool, rows: int = 1) -> None:
    """Refuses flags of distillation that contradict each other.

    Args:
        config: What is asked for.
        averages: Whether there is an average of the weights.
        sharded: Whether the model is split between processes.
        rows: Number of processes that share an image.

    Raises:
        UserError: Says which.
    """
    if config.mesa and config.has_teacher:
        raise UserError("--mesa and a --kd-... teacher exclude each other: choose one")
    if config.mesa and not averages:
        raise UserError("--mesa learns from the average of the weights: add --model-ema")
    if config.has_teacher:
        if rows > 1:
            raise UserError(
                "--rows gives each process a part of an image, which is not what a teacher was "
                "trained on: leave the --kd-... flags out, or learn from the average (--mesa)"
            )
        if sharded and config.kd_distill_type == "feature":
            raise UserError("--kd-distill-type feature does not work with --fsdp: use logit")
        return
    for key in ("distill_loss_weight", "task_loss_weight"):
        if getattr(config, key) is not None:
            raise UserError(
                f"--{key.replace('_', '-')} weighs a teacher: name one with --kd-model-name or "
                "--kd-checkpoint"
            )


def make_task(
    config: DistillationConfig,
    model: nn.Module,
    input: Preprocessing,
    class_names: Sequence[str] | None,
    device: torch.device,
    *,
    updates_per_epoch: int,
    smoothing: float,
    mixes: bool,
    memory_format: torch.memory_format = torch.preserve_format,
) -> TrainingTask:
    """Builds the task of a run.

    Args:
        config: Who teaches; `check_task` has passed it.
        model: The model to train.
        input: How its images are made.
        class_names: In label order, where known: a teacher's must be the same.
        device: Where it runs.
        updates_per_epoch: Optimiser updates in an epoch.
        smoothing: Of labels.
        mixes: Whether targets are distributions.
        memory_format: Of a teacher's weights.

    Raises:
        UserError: The teacher cannot be had, or does not fit.
    """
    common: dict[str, Any] = {
        "criterion_kwargs": {"smoothing": smoothing, "soft_targets": mixes},
        "device": device,
        "verbose": False,
    }
    if config.mesa:
        return MesaTask(
            model,
            weight=config.mesa,
            temperature=config.mesa_temperature,
            start_update=config.mesa_start_epoch * updates_per_epoch,
            **common,
        )
    if not config.has_teacher:
        return ClassificationTask(model, **common)
    common |= {
        "teacher_model": make_teacher(
            config.kd_model_name,
            config.kd_checkpoint,
            model,
            input,
            class_names,
            device,
            logits=config.kd_distill_type != "feature",
            memory_format=memory_format,
        ),
        "distill_loss_weight": config.distill_loss_weight,
        "task_loss_weight": config.task_loss_weight,
    }
    if config.kd_distill_type == "feature":
        return FeatureDistillationTask(model, **common)
    common["temperature"] = config.kd_temperature
    if config.kd_distill_type == "logit":
        kinds = {"kl": LogitDistillationTask, "hard": HardDistillationTask}
        return kinds[config.kd_loss_type](model, **common)
    try:
        return TokenDistillationTask(model, distill_type=config.kd_token_distill_type, **common)
    except ValueError as error:
        raise UserError(f"--kd-distill-type token: {one_line(error)}") from error
