"""One epoch of training."""

import contextlib
import dataclasses
import math
import time
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import NativeScaler, dispatch_clip_grad
from tqdm import tqdm

from vitlinear.errors import UserError


@dataclasses.dataclass
class Updater:
    """Turns losses into optimiser updates: scaling, clipping, accumulation, schedule, average.

    Attributes:
        task: Holds the model and the loss.
        optimizer: Steps once per group of ``accumulate`` batches.
        scheduler: timm schedule, or None.
        scaler: For float16, or None.
        accumulate: Batches per update; the last group of an epoch may be smaller.
        clip_grad: Bound, or None.
        clip_mode: ``norm``, ``value`` or ``agc``.
        ema: Whether the task averages its weights.
        updates: Updates made so far, over all epochs.
    """

    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None
    scaler: NativeScaler | None
    accumulate: int = 1
    clip_grad: float | None = None
    clip_mode: str = "norm"
    ema: bool = False
    updates: int = 0

    def backward(self, loss: torch.Tensor, group: int, last: bool) -> None:
        """Adds one batch's gradients, and updates after the last batch of a group.

        Args:
            loss: Mean over the batch.
            group: Number of batches in this group.
            last: Whether this batch is the group's last.
        """
        loss = loss / group
        # Between processes, gradients need exchanging only once per update.
        with contextlib.nullcontext() if last else self.task.no_sync():
            if self.scaler is not None:
                self.scaler(
                    loss,
                    self.optimizer,
                    clip_grad=self.clip_grad,
                    clip_mode=self.clip_mode,
                    parameters=self.parameters(),
                    need_update=last,
                )
            else:
                loss.backward()
        if not last:
            return
        if self.scaler is None:
            if self.clip_grad is not None:
                dispatch_clip_grad(self.parameters(), self.clip_grad, mode=self.clip_mode)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        if self.ema:
            self.task.update_ema(step=self.updates)
        if self.scheduler is not None:
            self.scheduler.step_update(self.updates)

    def parameters(self) -> Any:
        """Parameters whose gradients are clipped; adaptive clipping leaves the head alone."""
        return self.task.get_clip_parameters(exclude_head=self.clip_mode == "agc")


def updates_per_epoch(batches: int, accumulate: int) -> int:
    """Returns the number of optimiser updates in an epoch."""
    return math.ceil(batches / accumulate)


def train_one_epoch(
    updater: Updater,
    loader: Any,
    autocast: Any,
    *,
    title: str = "",
    channels_last: bool = False,
    log_interval: int = 50,
    show_progress: bool = True,
) -> dict[str, float]:
    """Trains on every batch of ``loader`` once.

    Args:
        updater: Model and optimiser.
        loader: Yields (images, targets); targets are class indices or, mixed, distributions.
        autocast: Function returning the context of a forward pass.
        title: Left of the progress bar.
        channels_last: Memory format of the images.
        log_interval: Updates between looks at the loss, each of which waits for a GPU.
        show_progress: Whether this process draws a bar (on a terminal only).

    Returns:
        ``loss`` and ``top1`` (percent; against the stronger label where images were mixed) over
        this process's images, ``images_per_s``.

    Raises:
        UserError: The loss is no longer finite.
    """
    task = updater.task
    task.train()
    batches = len(loader)
    loss_sum = torch.zeros((), dtype=torch.float64, device=task.device)
    correct = torch.zeros((), dtype=torch.int64, device=task.device)
    images, start = 0, time.perf_counter()
    updater.optimizer.zero_grad()
    bar = tqdm(
        loader, desc=title, leave=False, dynamic_ncols=True, disable=None if show_progress else True
    )
    for index, (batch, target) in enumerate(bar):
        if channels_last:
            batch = batch.contiguous(memory_format=torch.channels_last)
        group_start = index - index % updater.accumulate
        group = min(updater.accumulate, batches - group_start)
        last = index + 1 == group_start + group
        with autocast():
            result = task(batch, target)
        updater.backward(result["loss"], group, last)

        labels = target if target.ndim == 1 else target.argmax(dim=1)
        loss_sum += result["loss"].detach().double() * len(batch)
        correct += (result["output"].argmax(dim=1) == labels).sum()
        images += len(batch)
        if index + 1 == batches or (last and updater.updates % log_interval == 0):
            mean = loss_sum.item() / images
            if not math.isfinite(mean):
                raise UserError(
                    f"the loss became {mean} within {updater.updates} updates: lower --lr, add "
                    "--clip-grad 1, or use --amp-dtype bfloat16 in place of float16"
                )
            speed = images / (time.perf_counter() - start)
            bar.set_postfix_str(
                f"loss {mean:.4f}, top-1 {100 * correct.item() / images:.2f} %, {speed:.0f} img/s"
            )
    return {
        "loss": loss_sum.item() / images,
        "top1": 100 * correct.item() / images,
        "images_per_s": images / (time.perf_counter() - start),
    }
