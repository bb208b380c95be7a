"""Stopping a run from outside: a signal ends it at the next update, its state saved."""

import os
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import distributed

# What queues send before they take a machine away, what `kill` sends, and Ctrl-C.
NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")
HINT = b"\nstopping once the state is saved; Ctrl-C again stops at once, without saving\n"
# Updates between the processes' agreements: each waits for the GPU.
AGREE_EVERY = 10


class Stopped(Exception):
    """The run was asked to stop; its state is saved.

    Args:
        number: Of the signal.
        where: The place in the run.
        folder: The run folder; None in a process that writes nothing.

    Attributes:
        exit_status: 128 and the number of the signal, as shells report it.
        folder: As given: where it is None, the message is another process's to print.
    """

    def __init__(self, number: int, where: str, folder: Path | None = None) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} after {where}, state saved: the same "
            f"command with --resume {folder} continues"
        )
        self.exit_status, self.folder = 128 + number, folder


class StopSignals:
    """Context manager that takes note of signals instead of dying of them.

    A second Ctrl-C does what it would have done without us. Other signals may come twice where both
    the processes and their launcher are told to end.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for name in NAMES:
            if hasattr(signal, name):
                try:
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, self._note)
                except ValueError:  # only the main thread may; a run in another has no signals
                    break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
            os.write(2, HINT)  # a handler may interrupt a print, and must not print itself

    def agreed(self, device: torch.device, updates: int | None = None) -> int:
        """Returns the signal that some process received, or 0; the same in all processes.

        Args:
            device: Where the processes exchange tensors.
            updates: Made so far; the processes only ask each other every `AGREE_EVERY`. None asks.
        """
        if not distributed.is_initialized():
            return self.received
        if updates is not None and updates % AGREE_EVERY:
            return 0
        number = torch.tensor(self.received, device=device)
        distributed.all_reduce(number, distributed.ReduceOp.MAX)
        return int(number)
