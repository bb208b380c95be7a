"""Loss, top-1 and top-5 of a model on a loader, over all processes."""

import contextlib
from typing import Any

import torch
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from torch import nn
from tqdm import tqdm

from vitlinear.data.bad_images import UNREADABLE
from vitlinear.errors import UserError


class Evaluator(ClassificationEvaluator):
    """timm's evaluator, without the images that could not be read.

    Attributes:
        unreadable: Number of them, in this process.
    """

    def __init__(self, device: Any = None, *, max_samples: int | None = None) -> None:
        super().__init__(device)
        # Counted here, since timm's count of what it has seen would leave out the unreadable.
        self.left, self.unreadable = max_samples, 0

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Adds one batch of logits ``[B, C]`` and labels ``[B]``."""
        if self.left is not None:
            output, target = output[: self.left], target[: self.left]
            self.left -= len(target)
        readable = target != UNREADABLE
        self.unreadable += int((~readable).sum())
        self.add(output[readable], target[readable])

    def add(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Adds images that count."""
        super().update(output, target)

    def compute(self, distributed: bool = False) -> dict[str, float]:
        """Returns the metrics, of all processes if ``distributed``.

        Raises:
            UserError: There were images, and none could be read.
        """
        seen = torch.tensor([self.num_samples, self.unreadable], device=self.device)
        if distributed:
            torch.distributed.all_reduce(seen)
        read, unreadable = seen.tolist()
        if unreadable and not read:
            raise UserError(f"none of {unreadable} held-out images could be read")
        return {name: float(value) for name, value in super().compute(distributed).items()}


class PerClass(Evaluator):
    """Also counts images and hits per class."""

    def __init__(self, num_classes: int, device: Any = None) -> None:
        super().__init__(device)
        self.images = torch.zeros(num_classes, dtype=torch.int64, device=self.device)
        self.correct = torch.zeros(num_classes, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def add(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Adds images that count."""
        super().add(output, target)
        hits = target[output.argmax(dim=1) == target]
        self.images += torch.bincount(target, minlength=len(self.images))
        self.correct += torch.bincount(hits, minlength=len(self.images))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Any,
    autocast: Any,
    *,
    evaluator: Evaluator | None = None,
    device: torch.device | None = None,
    share: Any = contextlib.nullcontext,
    title: str = "eval",
    channels_last: bool = False,
    distributed: bool = False,
    show_progress: bool = True,
) -> dict[str, float]:
    """Evaluates ``model`` in eval mode and puts it back into the mode it was in.

    Args:
        model: Yields logits ``[B, C]``.
        loader: Yields (images, labels).
        autocast: Function returning the context of a forward pass.
        evaluator: Where to count; by default a fresh one.
        device: Where the model is; default CPU.
        share: Returns the context of a forward pass, which gives this process's part of the
            images.
        title: Left of the progress bar.
        channels_last: Memory format of the images.
        distributed: Sum over processes (padding of uneven shards is left out).
        show_progress: Whether this process draws a bar (on a terminal only).

    Returns:
        ``loss``, ``top1`` and ``top5`` in percent; top-5 of fewer than five classes is top-all.
    """
    if evaluator is None:
        evaluator = Evaluator(device, max_samples=evaluation_sample_limit(loader))
    was_training = model.training
    model.eval()
    try:
        disable = None if show_progress else True
        for batch, target in tqdm(
            loader, desc=title, leave=False, dynamic_ncols=True, disable=disable
        ):
            if channels_last:
                batch = batch.contiguous(memory_format=torch.channels_last)
            with share(batch) as images, autocast():
                output = model(images)
            if int(target.max()) >= output.shape[1]:
                raise UserError(
                    f"the data has a label {int(target.max())}, the model only "
                    f"{output.shape[1]} classes: num-classes and data do not match"
                )
            evaluator.update(output, target)
    finally:
        model.train(was_training)
    return evaluator.compute(distributed)
