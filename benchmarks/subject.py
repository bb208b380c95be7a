"""A model in one mode, in a process of its own: the subject of `benchmarks/models.py`.

Its own process makes the peak of resident memory that of this model alone, lets each model compile
by itself, and loses one row, not the run, where the system kills it for memory.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import gc
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.attention import held_bytes
from benchmarks.transcription import SUFFIX, check_transcribed, transcribe
from vitlinear.benchmark.programs import counted, folded
from vitlinear.benchmark.turns import Turn, answer_orders
from vitlinear.create import build_model, check_model_name
from vitlinear.errors import UserError, one_line
from vitlinear.layers.layout import KEEP_LAYOUT
from vitlinear.ops.backend import check_backend

# Of those, the ones that a training step can run.
MODES = {
    "eager": True,
    "fused": False,
    "compiled": True,
    "compiled-as-is": True,
    "fused-compiled-as-is": False,
    "exported": False,
}
PASSES = ("forward", "train")
# Weights and images of that type; amp_* are float32 weights under autocast, as recipes train.
PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "amp_bfloat16": torch.bfloat16,
    "amp_float16": torch.float16,
}
# Largest difference from the eager outputs over the largest eager output: 16-bit sums come in
# another order, or in float32 inside a compiled kernel.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a model, how it runs, and on what."""

    model: str
    mode: str
    task: str
    height: int
    width: int
    batch: int
    device: str = "cpu"
    precision: str = "float32"
    channels_last: bool = False
    threads: int = 1


def check_subject(name: str) -> None:
    """Does nothing if ``name`` is one that `build` takes.

    Raises:
        UserError: It is not: an unknown model or backend, or one that is not transcribed.
    """
    if name.endswith(SUFFIX):
        check_model_name(check_transcribed(name))
        return
    model, at, backend = name.partition("@")
    check_model_name(model)
    if at:
        if not timm.model_entrypoint(model).__module__.startswith("vitlinear."):
            raise UserError(f"{name}: only models of this package have attention backends")
        try:
            check_backend(backend, "backend of " + model)
        except ValueError as error:
            raise UserError(str(error)) from error


def build(name: str, size: tuple[int, int, int]) -> nn.Module:
    """A model for images of that size.

    Args:
        name: A model of timm's or ours, ``MODEL@BACKEND`` for one of ours on that attention
            backend, or with `SUFFIX` its transcription.
        size: Channels, height and width of an image.
    """
    if name.endswith(SUFFIX):
        return transcribe(build_model(check_transcribed(name), sizes={"input_size": size}))
    model, at, backend = name.partition("@")
    options = {"attn_backend": backend} if at else {}
    return build_model(model, sizes={"input_size": size}, **options)


def multiply_adds(model: nn.Module, size: tuple[int, int, int]) -> int:
    """Multiply-adds of one image: `vitlinear.benchmark.programs.counted`.

    Of our models that is projections and attention of `vitlinear.cards.count`, in eager mode.
    """
    return counted(copy.deepcopy(model).to("meta").eval(), size)


def prepared(model: nn.Module, mode: str, images: Tensor) -> nn.Module:
    """The model in a mode; a new module, or the same one changed in place."""
    if mode.startswith("fused"):
        model = folded(model)
    if mode == "compiled":
        return torch.compile(model)
    if mode.endswith("as-is"):
        return torch.compile(model, options=KEEP_LAYOUT)
    if mode == "exported":
        return torch.export.export(model, (images,)).module()
    return model


class Subject:
    """A model ready to be timed.

    Attributes:
        facts: ``parameters``, ``gmacs`` of one image, ``prepare_s``, ``difference``, and those of
            `measure_memory`.

    Raises:
        ArithmeticError: The outputs are not those of the eager model.
    """

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(case.threads)
        self.case, self.device = case, torch.device(case.device)
        dtype = PRECISIONS[case.precision]
        self.amp = case.precision.startswith("amp_")
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        kind: dict[str, Any] = {"device": self.device, "memory_format": layout}
        if not self.amp:
            kind["dtype"] = dtype
        size = (3, case.height, case.width)
        model = build(case.model, size).to(**kind)
        model.train(case.task == "train")
        self.images = torch.randn(case.batch, *size).to(**kind)
        self.facts: dict[str, Any] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "gmacs": multiply_adds(model, size) / 1e9,
        }
        start = time.perf_counter()
        if case.task == "train":
            self.prepare_training(prepared(model, case.mode, self.images))
        else:
            self.prepare_inference(model, TOLERANCES[dtype])
        self.facts["prepare_s"] = time.perf_counter() - start
        self.facts |= measure_memory(self.run, self.device)

    def autocast(self) -> Any:
        """Autocast, where the precision asks for it."""
        dtype = PRECISIONS[self.case.precision]
        return torch.autocast(self.device.type, dtype) if self.amp else contextlib.nullcontext()

    def prepare_inference(self, model: nn.Module, tolerance: float) -> None:
        """Sets `run`, after a call of it whose outputs are compared with the eager ones."""

        def run() -> Tensor:
            with torch.inference_mode(), self.autocast():
                return model(self.images)

        expected = run().float()
        model = prepared(model, self.case.mode, self.images)
        self.run: Callable[[], object] = run
        difference = float((run().float() - expected).abs().max() / expected.abs().max())
        self.facts["difference"] = difference
        if not difference <= tolerance:  # also where it is not a number
            raise ArithmeticError(f"outputs differ from eager ones by {difference:.2g} of them")

    def prepare_training(self, model: nn.Module) -> None:
        """Sets `run`: zero gradients, forward, loss, backward, an update by AdamW."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        labels = torch.arange(self.case.batch, device=self.device)

        def run() -> None:
            # In place, so that gradients are held before and after and count as resting memory.
            optimizer.zero_grad(set_to_none=False)
            with self.autocast():
                logits = model(self.images)
            F.cross_entropy(logits.float(), labels % logits.shape[-1]).backward()
            optimizer.step()

        run()
        self.run = run

    def timed(self) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        self.run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def rest(self) -> None:
        """Gives back the GPU memory that is free, which others need while this one waits."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def round(self, seconds: float) -> list[float]:
        """Times of calls, for about that long; at least one.

        One before them is left out: after other models ran it finds cold caches and, with several
        GiB of activations, took a third longer than those after it.
        """
        self.timed()
        times: list[float] = []
        while not times or sum(times) < seconds:
            times.append(self.timed())
        return times


def status(name: str) -> float:
    """A line of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {name}")


def measure_memory(run: Callable[[], object], device: torch.device) -> dict[str, float | None]:
    """Memory of a call at its worst beyond that held between calls, and the latter, in MiB.

    ``tensors_MiB`` counts PyTorch's allocations. ``memory_MiB`` and ``resting_MiB`` are the same on
    a GPU; on a CPU they are resident memory (VmRSS; VmHWM, reset before the call by writing 5 to
    /proc/self/clear_refs) after a first call and after glibc has given back what was free: code,
    threads and weights in a library's own layout are there by then and count as resting. None
    where the system has no such counters.
    """
    run()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        resting = torch.cuda.memory_allocated(device) / 2**20
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) / 2**20 - resting
        return {"memory_MiB": peak, "tensors_MiB": peak, "resting_MiB": resting}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning: Profiler clears events")
        tensors = held_bytes(run)[1] / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        resting = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        run()
        peak = max(status("VmHWM") - resting, 0.0)
    except (OSError, AttributeError):
        return {"memory_MiB": None, "tensors_MiB": tensors, "resting_MiB": None}
    return {"memory_MiB": peak, "tensors_MiB": tensors, "resting_MiB": resting}


def reason(error: BaseException) -> str:
    """Why a model could not be measured, in a line."""
    text = one_line(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"out of memory: {text}"
    return text if type(error).__name__ == "UserError" else f"{type(error).__name__}: {text}"


def serve(connection: Connection, case: Case) -> None:
    """The process of one subject, as `vitlinear.benchmark.turns.Serve` says."""

    def ready() -> tuple[dict[str, Any], Turn]:
        subject = Subject(case)
        subject.rest()

        def turn(seconds: float) -> list[float]:
            times = subject.round(seconds)
            subject.rest()
            return times

        return subject.facts, turn

    answer_orders(connection, ready, reason)
