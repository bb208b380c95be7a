"""One epoch of training."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import distributed

from vitlinear.data.loader import batches_from
from vitlinear.data.order import seed_step
from vitlinear.errors import UserError

from .nonfinite import diagnose, what_may_help
from .progress import Progress
from .rows import Share
from .updater import Updater


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
    row: int = 0,
    after_update: Callable[[Progress, dict[str, float] | None], None] | None = None,
    share: Share = contextlib.nullcontext,
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
        rank: Of this process, among those that share the data.
        row: Of this process, among those that share images.
        after_update: Called after each update, with what `Progress.updated` returned.
        share: Returns the context of a forward pass and its backward, which gives this process's
            part of the images.
        max_nonfinite: Updates of this epoch that may be skipped.
        channels_last: Memory format of the images.

    Returns:
        What `Progress.metrics` returns, and ``train_skipped`` updates.

    Raises:
        UserError: More updates than ``max_nonfinite``, or all of them, were skipped; or a batch
            norm has a single value of each channel to take statistics of.
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
            seed_step(seed, epoch, index, rank, row)
            group_batches.append((index, batch))
            skipped, lr = updater.skipped, updater.lr
            # Gradients need exchanging once per update; DDP decides on it in the forward pass.
            exchange = contextlib.nullcontext() if last else task.no_sync()
            with exchange, share(batch) as images:
                with autocast(), _enough_for_norms(batch):
                    result = task(images, target)
                updater.backward(result["loss"], group, last)
            progress.add(result["loss"], result["output"], target)
            if not last:
                continue
            if updater.skipped > skipped:
                progress.skipped += 1
                made = updates_per_epoch(index + 1, updater.accumulate)
                whole_epoch = progress.skipped == made and index + 1 == batches
                if progress.skipped > max_nonfinite or whole_epoch:
                    cause = _cause(updater, group_batches, autocast, share, seed, epoch, rank, row)
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


@contextlib.contextmanager
def _enough_for_norms(images: torch.Tensor) -> Iterator[None]:
    """Raises `UserError` where a norm in training mode gets one value of each channel."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        # torch's words, also behind a compiler's: "... value per channel", "... spatial element"
        if "Expected more than 1 " not in str(error):
            raise
        count, _, height, width = images.shape
        raise UserError(
            f"a norm of this model takes the statistics of a batch, and {count} image(s) of "
            f"{height} x {width} leave it one value of each channel: give --batch-size 2 or more, "
            "or larger images (--img-size)"
        ) from error


def _cause(
    updater: Updater,
    batches: list[tuple[int, torch.Tensor]],
    autocast: Any,
    share: Share,
    seed: int,
    epoch: int,
    rank: int,
    row: int,
) -> str:
    """Diagnoses the batches of an update; the first in which something is not finite, or the last.

    Every process looks at all of its batches: layers that talk to each other must meet. All of
    them tell of the process where it begins.
    """
    model = unwrap_model(updater.task.get_trainable_module())
    advice = what_may_help(updater.clip_grad is not None, updater.scaler is not None)
    causes = []
    for index, images in batches:
        seed_step(seed, epoch, index, rank, row)
        causes.append(diagnose(model, images, autocast, advice, share))
    place = next((number for number, cause in enumerate(causes) if cause.found), -1)
    own = (place % len(causes), causes[place])
    every = [own]
    if distributed.is_initialized():
        every = [own] * distributed.get_world_size()
        distributed.all_gather_object(every, own)
    return min(every, key=lambda one: (not one[1].found, one[0], one[1].order))[1].text
