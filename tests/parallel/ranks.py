"""A group of processes in which tests run functions, each on all of them.

One group serves a whole file: a process takes four seconds to import torch.
"""

import datetime
import os
import queue
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed, multiprocessing

TIMEOUT = 240  # seconds that a process waits for others, and a test for all of them


def _serve(rank: int, size: int, store: str, timeout: float, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            results.put((rank, function(*args), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
    # Not left in order: a process whose function failed may still be waiting for the others.
    os._exit(0)


class Ranks:
    """Processes that have joined one group over gloo, forked from this one."""

    def __init__(self, size: int, store: str, timeout: float = TIMEOUT) -> None:
        context = multiprocessing.get_context("fork")
        self.results: Any = context.Queue()
        self.tasks: list[Any] = [context.Queue() for _ in range(size)]
        self.processes = [
            context.Process(
                target=_serve,
                args=(rank, size, store, timeout, self.tasks[rank], self.results),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def run(
        self, function: Callable[..., Any], *args: Any, of: Sequence[int] | None = None
    ) -> list[Any]:
        """The function's values by process: of all, or of those that are expected to answer.

        Raises:
            AssertionError: It failed on some; the message is their tracebacks.
        """
        for tasks in self.tasks:
            tasks.put((function, args))
        given: dict[int, Any] = {}
        failed = []
        expected = range(len(self.processes)) if of is None else of
        for _ in expected:
            try:
                rank, value, error = self.results.get(timeout=TIMEOUT)
            except queue.Empty:
                failed.append("a process gave no answer")
                break
            given[rank] = value
            if error:
                failed.append(f"process {rank}: {error}")
        assert not failed, "\n".join(failed)
        return [given[rank] for rank in expected]

    def kill(self) -> None:
        """End processes that wait for others."""
        for process in self.processes:
            process.kill()
            process.join()

    def close(self) -> None:
        """End the processes."""
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
