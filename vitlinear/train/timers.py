"""Time that a process, or a GPU's stream, waits for work."""

import time

import torch


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
