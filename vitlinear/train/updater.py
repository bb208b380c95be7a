"""Losses to optimiser updates."""

from collections.abc import Iterator

import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from vitlinear.layers.moved_buffers import moved_buffers


class Updater:
    """Turns losses into optimiser updates: scaling, clipping, accumulation, schedule, average.

    An update whose loss or gradients are not finite is skipped without a trace: weights, moving
    average, BatchNorm statistics and what else moves in training stay as they were. The schedule
    goes on, so that a batch has its learning rate whatever happened before it. With a float16
    scaler, gradients that overflow under a finite loss are its ordinary business and are not
    counted, until its scale is below 1.

    Args:
        task: Holds the model and the loss.
        optimizer: Steps once per group of ``accumulate`` batches.
        scheduler: timm schedule, or None.
        scaler: For float16, or None.
        accumulate: Batches per update; the last group of an epoch may be smaller.
        clip_grad: Bound, or None.
        clip_mode: ``norm``, ``value`` or ``agc``.
        ema: Whether the task averages its weights.

    Attributes:
        updates: Updates made or skipped so far, over all epochs.
        skipped: How many of them were skipped.
    """

    def __init__(
        self,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler | None,
        scaler: torch.amp.GradScaler | None,
        accumulate: int = 1,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        ema: bool = False,
        updates: int = 0,
    ) -> None:
        self.task, self.optimizer, self.scheduler, self.scaler = task, optimizer, scheduler, scaler
        self.accumulate, self.clip_grad, self.clip_mode = accumulate, clip_grad, clip_mode
        self.ema, self.updates, self.skipped = ema, updates, 0
        model = task.get_trainable_module()
        assert model is not None
        # One list of tensors per type, as foreach copies want it; a copy of each beside it.
        buffers = [buffer for module in model.modules() for buffer in _moving(module)]
        groups = [[x for x in buffers if x.dtype == dtype] for dtype in {x.dtype for x in buffers}]
        self._statistics = [(group, [x.clone() for x in group]) for group in groups]
        self._losses_finite: torch.Tensor | None = None

    @property
    def lr(self) -> float:
        """Learning rate of the next update; with layer decay, of the last layers."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def backward(self, loss: torch.Tensor, group: int, last: bool) -> None:
        """Adds one batch's gradients, and updates after the last batch of a group.

        Args:
            loss: Mean over the batch.
            group: Number of batches in this group.
            last: Whether this batch is the group's last.
        """
        finite = loss.detach().isfinite()
        before = self._losses_finite
        self._losses_finite = finite if before is None else before & finite
        loss = loss / group
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if last:
            self._update()

    def _update(self) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        finite = self._clip()
        if self.scaler is not None:
            self.scaler.step(self.optimizer)  # does nothing where it found an infinity
            self.scaler.update()
        elif finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        if finite:
            self.keep_statistics()
            if self.ema:
                self.task.update_ema(step=self.updates)
        else:
            for now, kept in self._statistics:
                torch._foreach_copy_(now, kept)
            self.skipped += not self._overflowed_by_scaling()
        self._losses_finite = None
        if self.scheduler is not None:
            self.scheduler.step_update(self.updates)

    def _clip(self) -> bool:
        """Bounds the gradients; returns whether they are finite, the same in every process."""
        parameters = list(self.task.get_clip_parameters())
        gradients = [x.grad for x in parameters if x.grad is not None]
        norm = get_total_norm(gradients)
        if self.clip_grad is not None and self.clip_mode == "norm":
            clip_grads_with_norm_(parameters, self.clip_grad, norm)
        elif self.clip_grad is not None:  # adaptive clipping leaves the head alone
            chosen = self.task.get_clip_parameters(exclude_head=self.clip_mode == "agc")
            dispatch_clip_grad(chosen, self.clip_grad, mode=self.clip_mode)
        # of a model in parts, the norm of this process's is not that of the whole
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return bool(whole.isfinite())

    def _overflowed_by_scaling(self) -> bool:
        # Once losses are scaled down, the scale is no longer to blame: it would fall for ever.
        if self.scaler is None or self.scaler.get_scale() < 1:
            return False
        return self._losses_were_finite()

    def _losses_were_finite(self) -> bool:
        assert self._losses_finite is not None
        finite = self._losses_finite.to(torch.int32)
        if distributed.is_initialized():
            distributed.all_reduce(finite, distributed.ReduceOp.MIN)
        return bool(finite)

    def keep_statistics(self) -> None:
        """Takes the BatchNorm statistics, and what else moves in training, as good."""
        for now, kept in self._statistics:
            torch._foreach_copy_(kept, now)


def _moving(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yields the buffers of a module itself that a forward pass in training changes."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        yield from module.buffers(recurse=False)
    yield from (buffer for _, buffer in moved_buffers(module))
