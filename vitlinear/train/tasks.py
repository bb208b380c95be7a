"""What a step optimises: classification, alone or with a teacher, each as one of timm's tasks.

A task maps images and targets to a loss; the loop knows nothing else of it. Teachers are frozen,
see the student's batch as it was augmented and mixed, and are in no checkpoint.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.task import (
    ClassificationTask,
    DistillationTeacher,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn
from torch.nn import functional as F

from vitlinear.checkpoints.card import read_card
from vitlinear.checkpoints.load import load_model
from vitlinear.create import build_model, data_config
from vitlinear.data.dataset import check_same_classes
from vitlinear.errors import UserError, one_line


class Teacher(DistillationTeacher):
    """A frozen model that gets the student's images in its own normalisation and size.

    A teacher that is built for one size gets images of that size; any other sees the student's.

    Args:
        model: The teacher, with its weights.
        config: How its images are made, as `vitlinear.create.data_config` returns it.
        student: Likewise for the student, whose batches it will be given.
        device: Where it runs.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, Any],
        student: dict[str, Any],
        device: torch.device,
    ) -> None:
        super().__init__(model.to(device).requires_grad_(False), device=device)
        fixed = getattr(model, "pretrained_cfg", {}).get("fixed_input_size", False)
        self.size = tuple(config["input_size"][1:]) if fixed else None

        def per_channel(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)

        std = per_channel(config["std"])
        scale = per_channel(student["std"]) / std
        shift = (per_channel(student["mean"]) - per_channel(config["mean"])) / std
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.renormalises = config["mean"] != student["mean"] or config["std"] != student["std"]

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in eval mode."""
        return super().train(False)

    def normalize_input(
        self, input: torch.Tensor, student_mean: Any = None, student_std: Any = None
    ) -> torch.Tensor:
        """Returns the images [B, C, H, W] as the teacher wants them.

        timm's tasks pass the statistics of the student's pretrained weights, which are not those
        of its batches where flags or the data set give others; they are not used.
        """
        if self.renormalises:
            input = input * self.scale + self.shift
        if self.size is not None and tuple(input.shape[-2:]) != self.size:
            input = F.interpolate(input, self.size, mode="bicubic", antialias=True)
        return input


class HardDistillationTask(LogitDistillationTask):
    """Distillation from the teacher's decisions: cross-entropy with its most likely class.

    "Hard-label distillation" of DeiT (arXiv:2012.12877), section 4, with one classifier for both
    terms; weights and arguments are those of the base class, and ``temperature`` has no effect.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns ``loss``, ``output``, ``task_loss`` and ``kd_loss`` for images and targets."""
        output = self.trainable_module(input)
        task_loss = self.criterion(output, target)
        with torch.no_grad():
            decisions = self.teacher(self.teacher.normalize_input(input)).argmax(dim=-1)
        kd_loss = F.cross_entropy(output, decisions)
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return {"loss": loss, "output": output, "task_loss": task_loss, "kd_loss": kd_loss}


class MesaTask(ClassificationTask):
    """Self-distillation from the moving average of the weights (MESA, arXiv:2205.14083).

    From ``start_update`` on, the average in eval mode sees the same images as the student, and
    ``weight * T**2 * KL(softmax(average / T) || softmax(student / T))`` joins the loss. The factor
    ``T**2`` keeps the size of the gradient from depending on the temperature (arXiv:1503.02531,
    section 2), as in timm's distillation tasks; the MESA paper has none.

    Args:
        model: The student; `setup_ema` must follow.
        weight: Of the second term.
        temperature: ``T``.
        start_update: Optimiser updates before the average teaches.
        **kwargs: As for `timm.task.ClassificationTask`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: float,
        temperature: float,
        start_update: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.weight, self.temperature, self.start_update = weight, temperature, start_update
        self.updates = 0

    def train(self, mode: bool = True) -> "MesaTask":
        """Sets the mode of the student; the average stays in eval mode."""
        super().train(mode)
        if self.has_ema():
            self.trainable_module_ema.eval()
        return self

    def update_ema(self, step: int | None = None) -> None:
        """Updates the average, and counts."""
        super().update_ema(step)
        self.updates = self.updates + 1 if step is None else step

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Returns the count of updates, which says whether the average teaches already."""
        return {} if ema else {"updates": self.updates}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Restores the count of updates."""
        if state and not ema:
            self.updates = state["updates"]

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns ``loss`` and ``output``, later also ``task_loss`` and ``kd_loss``."""
        result = super().forward(input, target)
        if self.updates < self.start_update:
            return result
        average = self.get_eval_model(ema=True)
        if average is None:
            raise RuntimeError("MESA needs the average of the weights: call setup_ema() first")
        with torch.no_grad():
            teacher = F.log_softmax(average(input).float() / self.temperature, dim=-1)
        student = F.log_softmax(result["output"].float() / self.temperature, dim=-1)
        kd_loss = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        kd_loss = kd_loss * self.temperature**2
        loss = result["loss"] + self.weight * kd_loss
        return {**result, "loss": loss, "task_loss": result["loss"], "kd_loss": kd_loss}


def check_task(args: argparse.Namespace) -> None:
    """Refuses flags of distillation that contradict each other.

    Raises:
        UserError: Says which.
    """
    teaches = bool(args.kd_model_name or args.kd_checkpoint)
    if args.mesa and teaches:
        raise UserError("--mesa and a --kd-... teacher exclude each other: choose one")
    if args.mesa and not args.model_ema:
        raise UserError("--mesa learns from the average of the weights: add --model-ema")
    if args.fsdp and teaches and args.kd_distill_type == "feature":
        raise UserError("--kd-distill-type feature does not work with --fsdp: use logit")
    if teaches:
        return
    for key in ("distill_loss_weight", "task_loss_weight"):
        if getattr(args, key) is not None:
            raise UserError(
                f"--{key.replace('_', '-')} weighs a teacher: name one with --kd-model-name or "
                "--kd-checkpoint"
            )


def make_task(
    args: argparse.Namespace,
    model: nn.Module,
    config: dict[str, Any],
    class_names: Sequence[str] | None,
    device: torch.device,
    updates_per_epoch: int,
) -> TrainingTask:
    """Builds the task that flags ask for.

    Args:
        args: Flags that passed `check_task`.
        model: The model to train.
        config: How its images are made.
        class_names: In label order, where known: a teacher's must be the same.
        device: Where it runs.
        updates_per_epoch: Optimiser updates in an epoch.

    Raises:
        UserError: The teacher cannot be had, or does not fit.
    """
    mixing = args.mixup > 0 or args.cutmix > 0
    common: dict[str, Any] = {
        "criterion_kwargs": {"smoothing": args.smoothing, "soft_targets": mixing},
        "device": device,
        "verbose": False,
    }
    if args.mesa:
        return MesaTask(
            model,
            weight=args.mesa,
            temperature=args.mesa_temperature,
            start_update=args.mesa_start_epoch * updates_per_epoch,
            **common,
        )
    if not (args.kd_model_name or args.kd_checkpoint):
        return ClassificationTask(model, **common)
    common |= {
        "teacher_model": make_teacher(args, model, config, class_names, device),
        "distill_loss_weight": args.distill_loss_weight,
        "task_loss_weight": args.task_loss_weight,
    }
    if args.kd_distill_type == "feature":
        return FeatureDistillationTask(model, **common)
    common["temperature"] = args.kd_temperature
    if args.kd_distill_type == "logit":
        kinds = {"kl": LogitDistillationTask, "hard": HardDistillationTask}
        return kinds[args.kd_loss_type](model, **common)
    try:
        return TokenDistillationTask(model, distill_type=args.kd_token_distill_type, **common)
    except ValueError as error:
        raise UserError(f"--kd-distill-type token: {one_line(error)}") from error


def make_teacher(
    args: argparse.Namespace,
    student: nn.Module,
    config: dict[str, Any],
    class_names: Sequence[str] | None,
    device: torch.device,
) -> Teacher:
    """Builds the teacher: ``--kd-checkpoint``, or the published weights of ``--kd-model-name``.

    Raises:
        UserError: There are no such weights, or its classes or channels are not the student's.
    """
    num_classes, in_chans = int(student.num_classes), int(config["input_size"][0])  # type: ignore
    logits = args.kd_distill_type != "feature"
    name = args.kd_model_name
    if args.kd_checkpoint:
        card = read_card(Path(args.kd_checkpoint))
        # files that do not describe themselves are taken to be of the student's classes
        shape: dict[str, Any] = {} if card else {"num_classes": num_classes, "in_chans": in_chans}
        model, card = load_model(args.kd_checkpoint, model=name, **shape)
        name = args.kd_checkpoint
    else:
        model, card = build_model(name, pretrained=True, in_chans=in_chans), None
    own = card.data_config if card else data_config(model, {})
    if own["input_size"][0] != in_chans:
        raise UserError(
            f"the teacher {name} takes {own['input_size'][0]} channels, the student {in_chans}"
        )
    if logits and model.num_classes != num_classes:
        raise UserError(
            f"the teacher {name} knows {model.num_classes} classes, the student {num_classes}: "
            "train it on this data first and give its weights as --kd-checkpoint, or use "
            "--kd-distill-type feature"
        )
    if logits and card:
        check_same_classes(card.class_names, class_names, f"the teacher {name}", "the data")
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # JSON and flags give lists
    own, config = ({**c, "mean": tuple(c["mean"]), "std": tuple(c["std"])} for c in (own, config))
    return Teacher(model, own, config, device)
