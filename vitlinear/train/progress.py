"""The progress of an epoch: loss, top-1, speed, time without data, time to its end."""

import dataclasses
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import distributed
from tqdm import tqdm

from .timers import HostTimer, StreamTimer

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


Batch = TypeVar("Batch")
# What of these numbers depends on the machine and the day rather than on the run.
TIMES = ("seconds", "images_per_s", "data_wait", "peak_memory_gib")


@dataclasses.dataclass
class Sums:
    """Sums since the start of an epoch.

    Attributes:
        loss: Over all images.
        correct: Images whose (stronger) label got the highest logit.
        images: Seen; those of a batch without a finite loss count nowhere.
        seconds: Of wall clock.
        wait: Seconds of these in which there was no batch to compute on; ``data_wait`` is their
            share, from 0 to 1.
    """

    loss: float = 0.0
    correct: float = 0.0
    images: float = 0.0
    seconds: float = 0.0
    wait: float = 0.0

    def __sub__(self, other: "Sums") -> "Sums":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Sums(*(mine - theirs for mine, theirs in pairs))

    def metrics(self) -> dict[str, float]:
        """Returns ``train_loss``, ``train_top1`` (percent), ``images_per_s``, ``data_wait``."""
        seconds = max(self.seconds, 1e-9)
        return {
            "train_loss": self.loss / self.images if self.images else math.nan,
            "train_top1": 100 * self.correct / self.images if self.images else math.nan,
            "images_per_s": self.images / seconds,
            "data_wait": self.wait / seconds,
        }


class Progress:
    """Goes along with an epoch and tells how it goes.

    ::

        with Progress(len(loader), epoch=1, epochs=300) as progress:
            for images, target in progress.over(loader):
                ...
                progress.add(loss, logits, target)
                ...  # and after each optimiser update
                if values := progress.updated(updates, lr):
                    logger.log_update(updates, values)
        row = progress.metrics()

    A GPU is waited for only every ``log_interval`` updates. Then the numbers beside the bar are
    renewed where standard error is a terminal; where it is not, as under SLURM, a line is printed.

    Numbers are those of all processes together, which therefore all make the same calls; the
    time that data was waited for is their mean, and memory is this process's.

    Args:
        total: Number of batches in the whole epoch.
        epoch: Which one, counted from 1.
        epochs: Number of epochs of the run.
        done: Number of batches that an earlier process computed.
        state: What `state` returned there.
        device: Where losses come from; default CPU.
        log_interval: Updates between looks.
        show: Whether this process draws or prints.
        counts: Whether this process adds its images: of those that share them, one does.
        epoch_seconds: What a whole epoch takes with its evaluation, once that is known.

    Attributes:
        done: Number of batches so far.
        skipped: Updates that were left out, for the caller to count.
    """

    def __init__(
        self,
        total: int,
        *,
        epoch: int = 1,
        epochs: int = 1,
        done: int = 0,
        state: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        log_interval: int = 50,
        show: bool = True,
        counts: bool = True,
        epoch_seconds: float | None = None,
    ) -> None:
        self.total, self.epoch, self.epochs = total, epoch, epochs
        self.done = self.done_before = done
        self.device = device or torch.device("cpu")
        self.log_interval, self.show, self.epoch_seconds = log_interval, show, epoch_seconds
        self.counts = counts
        self.skipped, self.seconds_before, wait = 0, 0.0, 0.0
        # Loss, correct, images: a float64 goes through a checkpoint and back without a change.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64  # which MPS lacks
        self.sums = torch.zeros(3, dtype=dtype, device=self.device)
        # Where the last look was: the next one tells of the images since then.
        self.seen = Sums()
        if state is not None:
            self.sums.copy_(torch.tensor(_own(state["sums"]), dtype=torch.float64))
            self.seen = Sums(**state["seen"])
            self.skipped, self.seconds_before, wait = (
                state["skipped"], state["seconds"], state["wait"],
            )  # fmt: skip
        self.wait = (StreamTimer if self.device.type == "cuda" else HostTimer)(wait)
        self.start = time.perf_counter()
        self.end: float | None = None
        self.title = f"epoch {epoch}/{epochs}"
        self.bar: tqdm | None = None

    def __enter__(self) -> "Progress":
        self.start = time.perf_counter()
        if self.show and sys.stderr.isatty():
            self.bar = tqdm(
                desc=self.title, total=self.total, initial=self.done, leave=False,
                dynamic_ncols=True,
            )  # fmt: skip
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end = time.perf_counter()
        if self.bar is not None:
            self.bar.close()

    def over(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the batches of the epoch that are still to come."""
        remaining = iter(batches)
        while True:
            self.wait.begin()
            try:
                batch = next(remaining)
            except StopIteration:
                return
            self.wait.end()
            self.done += 1
            yield batch
            if self.bar is not None:
                self.bar.update()

    def add(self, loss: torch.Tensor, output: torch.Tensor, target: torch.Tensor) -> None:
        """Adds a batch.

        Args:
            loss: Mean over the batch.
            output: Logits ``[B, C]``.
            target: Labels ``[B]``, or distributions ``[B, C]`` where images were mixed; then the
                stronger label counts.
        """
        if not self.counts:
            return
        labels = target if target.ndim == 1 else target.argmax(dim=1)
        correct = (output.argmax(dim=1) == labels).sum()
        images = torch.full_like(correct, len(labels))
        dtype = self.sums.dtype
        loss = loss.detach().to(dtype)
        sums = torch.stack((loss * len(labels), correct.to(dtype), images.to(dtype)))
        self.sums += torch.where(loss.isfinite(), sums, torch.zeros_like(sums))

    def updated(self, updates: int, lr: float) -> dict[str, float] | None:
        """Looks at the numbers if it is time to.

        Args:
            updates: Optimiser updates made so far, over all epochs.
            lr: Learning rate of the last one.

        Returns:
            None between looks. Else a row for the loggers: ``epoch``, ``lr``, what `Sums.metrics`
            gives for the images since the last look, ``peak_memory_gib``, and ``seconds`` since
            the start of the epoch.
        """
        if updates % self.log_interval and self.done < self.total:
            return None
        now = self._now()
        since, self.seen = now - self.seen, now
        values = {"epoch": self.epoch, "lr": lr, **since.metrics(), **peak_memory(self.device)}
        if self.show:
            self._tell({**values, **now.metrics(), "images_per_s": values["images_per_s"]}, updates)
        return {**values, "seconds": now.seconds}

    def metrics(self) -> dict[str, float]:
        """Returns the numbers of the epoch so far, those of earlier processes included.

        What `Sums.metrics` gives, ``peak_memory_gib`` of this process, and ``seconds``.
        """
        sums = self._now()
        return {**sums.metrics(), **peak_memory(self.device), "seconds": sums.seconds}

    def state(self) -> dict[str, Any]:
        """Returns plain numbers, for going on in another process or in another number of them."""
        own = [self.sums]
        if distributed.is_initialized():
            own = [torch.empty_like(self.sums) for _ in range(distributed.get_world_size())]
            distributed.all_gather(own, self.sums)
        now = self._now()
        return {
            "sums": [sums.tolist() for sums in own],
            "seen": dataclasses.asdict(self.seen),
            "skipped": self.skipped,
            "seconds": now.seconds,
            "wait": now.wait,
        }

    def note(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self.show:
            self.bar.write(text) if self.bar is not None else print(text, flush=True)

    def _now(self) -> Sums:
        """Returns the sums over all processes."""
        every = torch.cat((self.sums, self.sums.new_tensor([self.wait.read()])))
        if distributed.is_initialized():
            distributed.all_reduce(every)
            every[3] /= distributed.get_world_size()
        loss, correct, images, wait = every.tolist()
        end = time.perf_counter() if self.end is None else self.end
        return Sums(loss, correct, images, self.seconds_before + end - self.start, wait)

    def _left(self) -> tuple[float, float]:
        """Returns the seconds to the end of the epoch's training and to that of the run."""
        batch = (time.perf_counter() - self.start) / max(self.done - self.done_before, 1)
        epoch = batch * (self.total - self.done)
        later = self.epoch_seconds or batch * self.total
        return epoch, epoch + later * (self.epochs - self.epoch)

    def _tell(self, values: Mapping[str, float], updates: int) -> None:
        epoch, run = (clock(seconds) for seconds in self._left())
        memory = values.get("peak_memory_gib")
        parts = [
            f"loss {values['train_loss']:.4f}",
            f"top-1 {values['train_top1']:.2f} %",
            f"{values['images_per_s']:.0f} images/s",
            f"{values['data_wait']:.0%} waiting for data",
            *([f"{memory:.2f} GiB"] if memory is not None else []),
            f"lr {values['lr']:.2e}",
        ]
        if self.bar is not None:  # which tells by itself how long the epoch will take
            self.bar.set_postfix_str(", ".join((*parts, f"run {run}")))
            return
        print(
            f"{self.title}, batch {self.done}/{self.total}, update {updates}: {', '.join(parts)}; "
            f"left {epoch} of the epoch, {run} of the run",
            flush=True,
        )


def _own(sums: Sequence[Sequence[float]]) -> Sequence[float]:
    """Returns this process's part; all of it is the first one's where their number has changed."""
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    rank = distributed.get_rank() if processes > 1 else 0
    if len(sums) == processes:
        return sums[rank]
    whole = [sum(parts) for parts in zip(*sums, strict=True)]
    return [part if rank == 0 else 0.0 for part in whole]


def clock(seconds: float) -> str:
    """Returns a duration as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def peak_memory(device: torch.device) -> dict[str, float]:
    """Returns ``peak_memory_gib`` of this process since its start.

    On a GPU, of what tensors took; on other devices, of the memory that the process itself held
    (without its data workers). Empty where the system does not say (Windows).
    """
    if device.type == "cuda":
        return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    if resource is None:
        return {}
    unit = 1 if sys.platform == "darwin" else 2**10
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
