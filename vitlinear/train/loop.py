"""One epoch of training."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad, unwrap_model
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from vitlinear.data.loader import batches_from
from vitlinear.data.order import seed_step
from vitlinear.errors import UserError

from .nonfinite import diagnose, what_may_help
from .progress import Progress


class Updater:
    """Turns losses into optimiser updates: scaling, clipping, accumulation, schedule, average.

    An update whose loss or gradients are not finite is skipped without a trace: weights, moving
    average and BatchNorm statistics stay as they were. The schedule goes on, so that a batch has
    its learning rate whatever happened before it. With a float16 scaler, gradients that overflow
    under a finite loss are its ordinary business and are not counted, until its scale is below 1.

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
        buffers = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for buffer in module.buffers(recurse=False)
        ]
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
        """Takes the BatchNorm statistics as they are for good."""
        for now, kept in self._statistics:
            torch._foreach_copy_(kept, now)


def updates_per_epoch(batches: int, accumulate: int) -> int:
    """Returns the number of optimiser updates in an epoch."""
    return math.ceil(batches / accumulate)


def train_one_epoch(
    updater: Updater,
    loader: Any,
    autocast: Any,
    progress: Progress | None = None,
    *,
    seed: int = 0,
    epoch: int = 0,
    rank: int = 0,
    after_update: Callable[[Progress, dict[str, float] | None], None] | None = None,
    max_nonfinite: int = 10,
    channels_last: bool = False,
) -> dict[str, float]:
    """Trains on every batch of ``loader`` that ``progress`` does not have yet.

    Args:
        updater: Model and optimiser.
        loader: Yields (images, targets); targets are class indices or, mixed, distributions.
        autocast: Function returning the context of a forward pass.
        progress: Shows and measures; where it starts, with the first batch of a group, this does.
        seed: Of the run.
        epoch: Number of the epoch, from 0.
        rank: Of this process.
        after_update: Called after each update, with what `Progress.updated` returned.
        max_nonfinite: Updates of this epoch that may be skipped.
        channels_last: Memory format of the images.

    Returns:
        What `Progress.metrics` returns, and ``train_skipped`` updates.

    Raises:
        UserError: More updates than ``max_nonfinite``, or all of them, were skipped.
    """
    task = updater.task
    task.train()
    batches = len(loader)
    progress = progress or Progress(batches, device=task.device, show=False)
    updater.optimizer.zero_grad()
    updater.keep_statistics()
    group_batches: list[tuple[int, torch.Tensor]] = []
    with progress:
        for index, (batch, target) in progress.over(batches_from(loader, progress.done)):
            if channels_last:
                batch = batch.contiguous(memory_format=torch.channels_last)
            group_start = index - index % updater.accumulate
            group = min(updater.accumulate, batches - group_start)
            last = index + 1 == group_start + group
            seed_step(seed, epoch, index, rank)
            group_batches.append((index, batch))
            skipped, lr = updater.skipped, updater.lr
            # Gradients need exchanging once per update; DDP decides on it in the forward pass.
            with contextlib.nullcontext() if last else task.no_sync():
                with autocast():
                    result = task(batch, target)
                updater.backward(result["loss"], group, last)
            progress.add(result["loss"], result["output"], target)
            if not last:
                continue
            if updater.skipped > skipped:
                progress.skipped += 1
                made = updates_per_epoch(index + 1, updater.accumulate)
                whole_epoch = progress.skipped == made and index + 1 == batches
                if progress.skipped > max_nonfinite or whole_epoch:
                    cause = _cause(updater, group_batches, autocast, seed, epoch, rank)
                    raise UserError(
                        f"{progress.skipped} of {made} updates of epoch {epoch + 1} had a loss or "
                        f"gradients that are not finite; {cause}"
                    )
                progress.note(
                    f"epoch {epoch + 1}, update {made}: loss or gradients not finite, update "
                    f"skipped ({progress.skipped} in this epoch, at most {max_nonfinite})"
                )
            group_batches.clear()
            values = progress.updated(updater.updates, lr)
            if after_update is not None:
                after_update(progress, values)
    return {**progress.metrics(), "train_skipped": float(progress.skipped)}


def _cause(
    updater: Updater,
    batches: list[tuple[int, torch.Tensor]],
    autocast: Any,
    seed: int,
    epoch: int,
    rank: int,
) -> str:
    """Diagnoses the batches of an update; the first in which something is not finite, or the last.

    Every process looks at all of its batches: layers that talk to each other must meet.
    """
    model = unwrap_model(updater.task.get_trainable_module())
    advice = what_may_help(updater.clip_grad is not None, updater.scaler is not None)
    causes = []
    for index, images in batches:
        seed_step(seed, epoch, index, rank)
        causes.append(diagnose(model, images, autocast, advice))
    return next((cause for cause in causes if cause.found), causes[-1]).text
