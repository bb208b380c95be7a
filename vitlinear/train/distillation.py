"""Losses of distillation that timm lacks: hard labels of a teacher, and MESA."""

from typing import Any

import torch
from timm.task import ClassificationTask, LogitDistillationTask
from torch import nn
from torch.nn import functional as F


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
