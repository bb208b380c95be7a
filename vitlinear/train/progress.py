"""How an epoch goes: its loss and top-1, its speed, what it waits for, and when it will end."""

import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import distributed
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


@dataclasses.dataclass
class Sums:
    """What has been added up since the start of an epoch.

    Attributes:
        loss: Over all images.
        correct: Images whose (stronger) label got the highest logit.
        images: Seen.
        seconds: Of wall clock.
        wait: Seconds of these in which there was no batch to compute on; ``data_wait`` is their
            share, from 0 to 1.
    """

    loss: float = 0.0
    correct: int = 0
    images: int = 0
    seconds: float = 0.0
    wait: float = 0.0

    def __sub__(self, other: "Sums") -> "Sums":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Sums(*(mine - theirs for mine, theirs in pairs))

    def metrics(self) -> dict[str, float]:
        """Returns ``train_loss``, ``train_top1`` (percent), ``images_per_s``, ``data_wait``."""
        images, seconds = max(self.images, 1), max(self.seconds, 1e-9)
        return {
            "train_loss": self.loss / images,
            "train_top1": 100 * self.correct / images,
            "images_per_s": self.images / seconds,
            "data_wait": self.wait / seconds,
        }


class HostTimer:
    """Adds up the time between `begin` and `end`, by the clock of this process."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def begin(self) -> None:
        """Starts."""
        self.start = time.perf_counter()

    def end(self) -> None:
        """Stops."""
        self.seconds += time.perf_counter() - self.start

    def read(self) -> float:
        """Returns the seconds so far."""
        return self.seconds


class StreamTimer:
    """Adds up the time that a GPU's stream has nothing to do between `begin` and `end`.

    A process runs ahead of its GPU: while it waits for data, the GPU may well be busy.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        """Marks the end of what the stream has been given so far."""
        self.first = torch.cuda.Event(enable_timing=True)
        self.first.record()

    def end(self) -> None:
        """Marks when the stream is at work again."""
        last = torch.cuda.Event(enable_timing=True)
        last.record()
        self.spans.append((self.first, last))

    def read(self) -> float:
        """Returns the seconds so far; waits for the GPU."""
        for first, last in self.spans:
            last.synchronize()
            self.seconds += first.elapsed_time(last) / 1e3
        self.spans.clear()
        return self.seconds


class Progress:
    """Iterates over the batches of an epoch and tells how it goes.

    ::

        with Progress(loader, len(loader), epoch=1, epochs=300) as progress:
            for images, target in progress:
                ...
                progress.add(loss, logits, target)
                ...  # and after each optimiser update
                if values := progress.updated(updates, lr):
                    logger.log_update(updates, values)
        row = progress.metrics()

    A GPU is waited for only every ``log_interval`` updates. Then the numbers beside the bar are
    renewed where standard error is a terminal; where it is not, as under SLURM, a line is printed.

    Args:
        batches: Those of the epoch that are still to come.
        total: Number of batches in the whole epoch.
        epoch: Which one, counted from 1.
        epochs: Number of epochs of the run.
        done: Number of batches that an earlier process computed.
        state: What `state` returned there.
        device: Where losses come from; default CPU.
        log_interval: Updates between looks.
        show: Whether this process draws or prints.
        reduce: Whether to add up over all processes; each then makes the same calls.
        epoch_seconds: What a whole epoch takes with its evaluation, once that is known.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        total: int,
        *,
        epoch: int,
        epochs: int,
        done: int = 0,
        state: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        log_interval: int = 50,
        show: bool = True,
        reduce: bool = False,
        epoch_seconds: float | None = None,
    ) -> None:
        self.batches, self.total, self.epoch, self.epochs = batches, total, epoch, epochs
        self.done = self.done_before = done
        self.device = device or torch.device("cpu")
        self.log_interval, self.reduce, self.epoch_seconds = log_interval, reduce, epoch_seconds
        sums = Sums(**state["now"]) if state else Sums()
        # Where the last look was: the next one tells of the images since then.
        self.seen = Sums(**state["seen"]) if state else Sums()
        # A float64 goes through a checkpoint and back without a change.
        self.loss = torch.tensor(sums.loss, dtype=torch.float64, device=self.device)
        self.correct = torch.tensor(sums.correct, dtype=torch.int64, device=self.device)
        self.images, self.seconds_before = sums.images, sums.seconds
        self.wait = (StreamTimer if self.device.type == "cuda" else HostTimer)(sums.wait)
        self.show, self.start = show, time.perf_counter()
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

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batches)
        while True:
            self.wait.begin()
            try:
                batch = next(batches)
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
        labels = target if target.ndim == 1 else target.argmax(dim=1)
        self.loss += loss.detach().double() * len(output)
        self.correct += (output.argmax(dim=1) == labels).sum()
        self.images += len(output)

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
        now = self._sums()
        since, self.seen = now - self.seen, now
        values = {"epoch": self.epoch, "lr": lr, **since.metrics(), **peak_memory(self.device)}
        if self.show:
            self._tell({**values, **now.metrics(), "images_per_s": values["images_per_s"]}, updates)
        return {**values, "seconds": now.seconds}

    def metrics(self) -> dict[str, float]:
        """Returns the numbers of the epoch so far, those of earlier processes included.

        What `Sums.metrics` gives, ``peak_memory_gib`` of this process, and ``seconds``.
        """
        sums = self._sums()
        return {**sums.metrics(), **peak_memory(self.device), "seconds": sums.seconds}

    def state(self) -> dict[str, dict[str, float]]:
        """Returns this process's sums as plain numbers, for going on in another process."""
        now = Sums(
            self.loss.item(), int(self.correct.item()), self.images, self._seconds(),
            self.wait.read(),
        )  # fmt: skip
        return {"now": dataclasses.asdict(now), "seen": dataclasses.asdict(self.seen)}

    def _seconds(self) -> float:
        end = time.perf_counter() if self.end is None else self.end
        return self.seconds_before + end - self.start

    def _sums(self) -> Sums:
        """Returns the sums over all processes; the time that data was waited for is their mean."""
        own = torch.stack((self.loss, self.correct.double()))
        if not self.reduce:
            loss, correct = own.tolist()
            return Sums(loss, int(correct), self.images, self._seconds(), self.wait.read())
        more = torch.tensor(
            (self.images, self.wait.read()), dtype=torch.float64, device=self.device
        )
        every = torch.cat((own, more))
        distributed.all_reduce(every)
        loss, correct, images, wait = every.tolist()
        wait /= distributed.get_world_size()
        return Sums(loss, int(correct), int(images), self._seconds(), wait)

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
