"""A GPU that is not there: its memory is the CPU's, and its kernels run in Triton's interpreter.

It can be told to compute wrongly, to be slow, to have too few resources, or no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import GridExecutor

from vitlinear.ops import backend, gpu, self_check

NAME = "Stand-in 1"


class StandIn:
    """The device, and what it is told.

    Attributes:
        gpu: What it says it is.
        wrong: Read-outs (`Mechanism.read_out`) whose output is off by a hundredth.
        failing: Names of kernels -> what launching them raises.
        seconds: Names of kernels -> how long one launch takes, on this device's own clock.
        clock: Seconds that launches have taken.
        launched: Names of the kernels that ran.
        capturing: Whether it records a graph.
    """

    def __init__(self) -> None:
        self.gpu = gpu.Gpu(NAME, "sm_90", (9, 0), "1.2.3", "3.6.0")
        self.wrong: set[str] = set()
        self.failing: dict[str, Exception] = {}
        self.seconds: dict[str, float] = {}
        self.clock = 0.0
        self.launched: list[str] = []
        self.capturing = False

    def launch(
        self, executor: GridExecutor, run: Callable[[], None], args: Any, kwargs: Any
    ) -> None:
        """Run a kernel as this device does."""
        name = executor.fn.__name__
        if name in self.failing:
            raise self.failing[name]
        run()
        self.launched.append(name)
        self.clock += self.seconds.get(name, 1e-3)
        given = {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}
        if "out" in given and given["plan"].read_out in self.wrong:
            given["out"][0].mul_(1.01)


def out_of_resources() -> OutOfResources:
    """The error of a launch on a device with too little shared memory."""
    return OutOfResources(300_000, 227_000, "shared memory")


def install(monkeypatch: pytest.MonkeyPatch, cache: Path) -> StandIn:
    """Put a stand-in in the place of the GPU, with an empty cache of its user in a folder."""
    device = StandIn()
    interpret = GridExecutor.__call__

    def launch(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        device.launch(executor, lambda: interpret(executor, *args, **kwargs), args, kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    monkeypatch.setattr(gpu, "DEVICES", ("cpu",))
    monkeypatch.setattr(gpu, "describe", lambda index=None: device.gpu)
    monkeypatch.setattr(gpu, "is_capturing", lambda: device.capturing)
    monkeypatch.setattr(self_check, "GRIDS", ((3, 5),))  # the interpreter is slow
    monkeypatch.setattr(backend, "LEAST_TOKENS", 64)
    monkeypatch.setattr(backend, "LEAST_TOKENS_IN_TRAINING", 32)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    backend.forget()
    return device


def out_of_memory() -> torch.OutOfMemoryError:
    """The error of PyTorch where there is no memory."""
    return torch.OutOfMemoryError("no memory left on the stand-in")
