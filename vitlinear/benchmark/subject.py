"""A program in one runtime: what `turns` times, in a process of its own."""

from __future__ import annotations

import dataclasses
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

import vitlinear  # noqa: F401 - registers the models, in this process too
from vitlinear.errors import UserError, one_line

from .programs import Size
from .runtimes import RUNTIMES, multiplying
from .turns import Turn, answer_orders

# Greatest difference from the fused model in PyTorch: its norm over that of the logits.
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a program, where it runs, and on what.

    Attributes:
        model: Name of the model, or of the file.
        runtime: Key in `RUNTIMES`.
        batch: Images.
        height: In pixels.
        width: In pixels.
        threads: Of the runtime.
        origin: Name of the model that the program was made of; empty if it is not known.
        file: The ONNX program, if the runtime takes files and there is one.
        obstacle: Why there is none, if the runtime takes files.
        expected: File of the logits; None if nobody knows them.
        gmacs: Multiply-adds of an image, in units of 1e9, if they are known.
        profiled: Ask the runtime for the times of its parts.
    """

    model: str
    runtime: str
    batch: int
    height: int
    width: int
    threads: int
    origin: str
    file: str | None
    obstacle: str
    expected: str | None
    gmacs: float | None
    profiled: bool


def prepare(case: Case) -> tuple[Any, dict[str, Any]]:
    """Makes a program ready: returns what runs it, and its facts.

    Facts are ``prepare_s``, the time until the first logits; ``difference``, as `TOLERANCE` has it;
    and, if asked for, ``kinds_ms``, the runtime's own times by kind of node, with
    ``multiplying_ms``, those of products, convolutions and softmax attention.

    Raises:
        ArithmeticError: The logits are not those of the model.
        UserError: There is no program.
    """
    runtime = RUNTIMES[case.runtime]
    if runtime.takes_files and case.file is None:
        raise UserError(case.obstacle)
    start = time.perf_counter()
    size = Size(case.batch, case.height, case.width)
    ready = runtime.prepare(case.model, case.file or "", size, case.threads)
    logits = ready.run()
    facts: dict[str, Any] = {"prepare_s": time.perf_counter() - start}
    if case.expected:
        expected = np.load(case.expected)
        facts["difference"] = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
        if not facts["difference"] <= TOLERANCE:  # also where it is not a number
            raise ArithmeticError(
                f"logits differ from those of the model by {facts['difference']:.2g} of their norm"
            )
    if case.profiled:
        facts["kinds_ms"] = dict(ready.profile())
        facts["multiplying_ms"] = multiplying(case.runtime, facts["kinds_ms"])
    return ready.run, facts


def serve(connection: Connection, case: Case) -> None:
    """The process of a subject, as `turns.Serve` says."""

    def ready() -> tuple[dict[str, Any], Turn]:
        run, facts = prepare(case)

        def turn(seconds: float) -> list[float]:
            run()  # finds cold caches after others ran
            times: list[float] = []
            while not times or sum(times) < seconds:
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            return times

        return facts, turn

    def reason(error: Exception) -> str:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return kind + one_line(error)

    answer_orders(connection, ready, reason)
