"""Subjects of a measurement that take turns, each in a process of its own.

All subjects of one condition are timed round by round: a neighbour that takes the processor for a
minute slows all of them, and ratios of single rounds hardly move. A process of its own lets each
subject have its threads and its memory for itself, and loses one row, not the run, where the system
ends it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

# With these glibc keeps freed pages, as a caching allocator would. A process reads them when it
# starts: they have to be in the environment before the first subject is.
KEEP_PAGES = {
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "500000000",
    "MALLOC_MMAP_MAX_": "0",
}
# Of the memory that the largest subject so far took, which has to be left for the next one.
MARGIN = 1.25
# The process of a subject, which calls `answer_orders`.
Serve = Callable[[Connection, Any], None]
Turn = Callable[[float], list[float]]  # seconds -> times of its calls


def answer_orders(
    connection: Connection,
    prepare: Callable[[], tuple[dict[str, Any], Turn]],
    reason: Callable[[Exception], str],
) -> None:
    """Times a subject, in a process of its own, until it is told, or left, to end.

    It sends ("facts", ...), or ("error", text) and ends; then, for each number of seconds that it
    receives, ("times", [...]); it ends when it receives None.

    Args:
        connection: To the process that asks.
        prepare: Makes the subject ready: its facts, and what runs one turn of it.
        reason: Why it cannot be measured, in a line.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one
    with contextlib.suppress(OSError):
        # When memory runs out, this process is to be killed, not somebody else's.
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        facts, turn = prepare()
        connection.send(("facts", facts))
        while (seconds := connection.recv()) is not None:
            connection.send(("times", turn(seconds)))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        connection.send(("error", reason(error)))


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that processes can still take, of the machine and of every limit around this one.

    Infinite where the system says nothing.

    Args:
        root: Where the file systems proc and cgroup, of version 2 or 1, are mounted.
    """
    least = 1024 * _counts(root / "proc/meminfo").get("MemAvailable:", math.inf)
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names, prefix = "", ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):
            top, names = "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            prefix = "total_"  # with the groups below, as the usage is
        else:
            continue
        mount = root / "sys/fs/cgroup" / top
        group = mount / path.strip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(mount.parts)]):
            with contextlib.suppress(OSError, ValueError):  # no such group; "max": no limit
                most, now = (int((folder / name).read_text()) for name in names)
                stat = _counts(folder / "memory.stat")
                # Pages of files are given back where memory runs short.
                files = sum(stat.get(f"{prefix}{kind}active_file", 0) for kind in ("", "in"))
                least = min(least, float(most - now + files))
    return least


def _lines(path: Path) -> list[str]:
    """Lines of a file; none where it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _counts(path: Path) -> dict[str, int]:
    """The numbers that stand behind the first words of lines."""
    rows = [line.split() for line in _lines(path)]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


class FailedError(Exception):
    """A subject that cannot be measured; the message says why."""


class Process:
    """The process of a subject, and what is said to it."""

    def __init__(self, serve: Serve, case: Any, timeout: float) -> None:
        context = multiprocessing.get_context("forkserver")
        # Not vitlinear: a fork server may not see the path that this checkout is on.
        context.set_forkserver_preload(["torch._dynamo", "torch.export", "torchvision", "timm"])
        self.timeout, self.asked = timeout, time.monotonic()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, case))
        self.process.start()
        theirs.close()

    def ask(self, seconds: float) -> list[float]:
        """Times of the calls of one round."""
        self.asked = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # `answer` says why
            self.connection.send(seconds)
        return self.answer()

    def answer(self, deadline: float = math.inf) -> Any:
        """Waits for its next message; ends a process that takes longer than it may."""
        left = min(self.asked + self.timeout, deadline) - time.monotonic()
        if not self.connection.poll(max(left, 0)):
            self.process.kill()
            why = "--timeout" if math.isinf(deadline) else "no time left"
            raise FailedError(f"gave up after {time.monotonic() - self.asked:.0f} s ({why})")
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode or 0
            cause = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            hint = ": out of memory, perhaps" if code == -9 else ""
            raise FailedError(f"its process {cause}{hint}") from None
        if kind == "error":
            raise FailedError(value)
        return value

    def close(self) -> None:
        """Ends it, by force if it does not listen."""
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(None)
            self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()


def measure(
    serve: Serve,
    cases: Sequence[Any],
    rounds: int,
    seconds: float,
    timeout: float,
    *,
    at_once: int = 1,
    deadline: float = math.inf,
) -> list[dict[str, Any]]:
    """Rows of cases that take turns.

    A row has the fields of its `Case` and either ``error`` or ``facts`` of the subject,
    ``round_ms`` (the median call of each round), ``calls`` and ``p10_ms``, ``p50_ms``, ``p90_ms``
    and ``p99_ms`` over all calls, and ``images_per_s``, the batch over the median.

    Args:
        serve: Runs in the process of a subject; from the top of a module.
        cases: What to measure: dataclasses, each with a field `batch`.
        rounds: How many rounds each of them gets.
        seconds: Length of its turn in a round.
        timeout: Seconds that it may take to prepare or to answer.
        at_once: How many prepare at once. On CPUs more than one would slow each other down, and
            measure each other's memory where they have to share it.
        deadline: On the clock of `time.monotonic`: past it nothing is prepared and no further
            round begins.
    """
    rows: list[dict[str, Any]] = [dataclasses.asdict(case) for case in cases]
    processes: dict[int, Process] = {}
    times: dict[int, list[list[float]]] = {i: [] for i in range(len(cases))}
    taken = 0.0  # the most that those which prepared together took

    def drop(i: int, error: FailedError) -> None:
        rows[i]["error"] = str(error)
        processes.pop(i).close()

    try:
        for first in range(0, len(cases), at_once):
            together = range(first, min(first + at_once, len(cases)))
            if time.monotonic() >= deadline:
                for i in together:
                    rows[i]["error"] = "skipped: no time left"
                continue
            before = available_memory()
            if before < MARGIN * taken:  # a machine that runs out of memory answers nobody
                for i in together:
                    rows[i]["error"] = "no memory left beside the rows before: give it its own run"
                continue
            for i in together:
                processes[i] = Process(serve, cases[i], timeout)
            for i in together:
                try:
                    rows[i] |= processes[i].answer(deadline)
                except FailedError as error:
                    drop(i, error)
            taken = max(taken, before - available_memory())
        for turn in range(rounds):
            if turn and time.monotonic() > deadline:
                break
            order = sorted(processes)
            start = turn % max(len(order), 1)
            for i in order[start:] + order[:start]:  # nobody always follows the same model
                try:
                    times[i].append(processes[i].ask(seconds))
                except FailedError as error:
                    drop(i, error)
    finally:
        for process in processes.values():
            process.close()
    for i, row in enumerate(rows):
        if "error" in row:
            continue
        calls = [time for turn in times[i] for time in turn]
        row["calls"] = len(calls)
        for percent in (10, 50, 90, 99):
            row[f"p{percent}_ms"] = 1e3 * float(np.percentile(calls, percent))
        row["round_ms"] = [1e3 * statistics.median(turn) for turn in times[i]]
        row["images_per_s"] = 1e3 * row["batch"] / row["p50_ms"]
    return rows
