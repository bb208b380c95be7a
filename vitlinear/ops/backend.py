"""The choice of the implementation that runs an attention, and its reason.

``eager``    the formulas of `vitlinear.ops.eager`: any derivative, fused by `torch.compile`,
             exported to anything.
``library``  the registered operators of `vitlinear.ops.registered` with closed-form formulas: keep
             only q, k and v for backward, opaque to compilers.
``triton``   the same operators with fused GPU kernels (`vitlinear.ops.triton`). float64 runs the
             eager formula.
``auto``     what the environment variable ``VITLINEAR_BACKEND`` says; else ``triton`` where the
             committed measurements (measured.json) say that it is faster, and ``eager`` everywhere
             else: on CPUs it is about as fast as ``library`` (benchmarks/README.md) and can do
             more.

Modules take the choice for linear attention; their softmax stages always run on SDPA. With
``TRITON_INTERPRET=1`` in the environment the kernels run in Triton's interpreter, on CPU tensors:
slow, for tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "eager", "library", "triton")
ENVIRONMENT_VARIABLE = "VITLINEAR_BACKEND"
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL_HEAD_DIM = 128  # the largest

# Read once: a look-up at each call would be a guard, or a break, in compiled graphs.
_from_environment = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
_interpreting = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
_has_triton = importlib.util.find_spec("triton") is not None

# Why the kernels failed, once they have: ``auto`` does not try again.
_failure: str | None = None


class KernelError(RuntimeError):
    """A fused kernel did not compile or did not launch."""


class Choice(NamedTuple):
    """A backend and the reason that it was taken."""

    backend: str
    reason: str


class Workload(NamedTuple):
    """The tensors of a call, as far as the choice may depend on them.

    Attributes:
        device: Type of the device.
        dtype: Of q, k and v.
        length: N.
        head_dim: D.
        mechanism: Key in `MECHANISMS`.
        without_kernels: What of the call the kernels cannot do, in words; empty if nothing.
    """

    device: str
    dtype: torch.dtype
    length: int
    head_dim: int
    mechanism: str
    without_kernels: str = ""

    @classmethod
    def of(cls, q: Tensor, mechanism: str, without_kernels: str = "") -> Workload:
        """The workload of a call with these queries, [B, N, h, D]."""
        return cls(q.device.type, q.dtype, q.shape[1], q.shape[3], mechanism, without_kernels)


class Measurement(NamedTuple):
    """One row of measured.json: how much faster the kernels are than the eager formula.

    Attributes:
        device: Name of the GPU.
        mechanism: Key in `MECHANISMS`.
        dtype: Name of the type.
        head_dim: D.
        length: N; holds for longer sequences too, up to the next row.
        speedup: Time of the compiled eager formula, forward and backward, over that of the kernels.
    """

    device: str
    mechanism: str
    dtype: str
    head_dim: int
    length: int
    speedup: float


_measured = tuple(
    Measurement(**row)
    for row in json.loads(Path(__file__).with_name("measured.json").read_text())["rows"]
)


def check_backend(name: str, source: str = "backend") -> str:
    """Return the name if it is one of `BACKENDS`.

    Raises:
        ValueError: It is not; the message says where the name came from.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown {source} {name!r}; choose from: {', '.join(BACKENDS)}")
    return name


def requested_backend(requested: str = "auto") -> Choice:
    """The backend that argument and environment ask for, ``auto`` among them, and which of the two.

    Raises:
        ValueError: The name, or that in ``VITLINEAR_BACKEND``, is unknown.
    """
    if check_backend(requested) != "auto":
        return Choice(requested, "asked for by argument")
    if check_backend(_from_environment, f"{ENVIRONMENT_VARIABLE} value") != "auto":
        return Choice(_from_environment, f"set by {ENVIRONMENT_VARIABLE}")
    return Choice("auto", "nothing asked for")


def choose_backend(requested: str = "auto", work: Workload | None = None) -> Choice:
    """Decide what runs an attention.

    Args:
        requested: One of `BACKENDS`. A name other than ``auto`` wins over the environment.
        work: The tensors of the call; None to hear what was asked for, and ``eager`` if nothing
            was.

    Returns:
        ``eager``, ``library`` or ``triton``, with the reason in words.

    Raises:
        ValueError: The name, or that in ``VITLINEAR_BACKEND``, is unknown; or it is ``triton`` and
            the kernels cannot run this call.
    """
    choice = requested_backend(requested)
    if choice.backend == "auto":
        choice = _automatic(work)
    elif choice.backend == "triton" and work is not None:
        if work.dtype == torch.float64:
            choice = Choice("eager", "the kernels have no float64")
        elif obstacle := _obstacle(work):
            raise ValueError(f"backend 'triton' ({choice.reason}) cannot run: {obstacle}")
    if choice.backend != "eager" and torch.onnx.is_in_onnx_export():
        choice = Choice("eager", "ONNX has no vitlinear operators")
    return choice


def _obstacle(work: Workload) -> str | None:
    """The reason why the kernels cannot run a call; None if they can."""
    if not _has_triton:
        return "triton is not installed"
    if work.device not in ("cuda", "meta") and not (_interpreting and work.device == "cpu"):
        return f"it needs a GPU, and the inputs are on {work.device!r}"
    if work.dtype not in KERNEL_DTYPES:
        return f"it has no kernels for {work.dtype}"
    if work.head_dim > KERNEL_HEAD_DIM:
        return f"it holds heads of up to {KERNEL_HEAD_DIM} channels, not {work.head_dim}"
    if work.without_kernels:
        return f"it has no kernels for {work.without_kernels}"
    return None


def _automatic(work: Workload | None) -> Choice:
    """The choice of ``auto``: the kernels where they have been measured to be faster."""
    if work is None or work.device == "cpu":
        return Choice("eager", "auto: kernels need a GPU")
    if obstacle := _obstacle(work):
        return Choice("eager", f"auto: {obstacle}")
    if _failure is not None:
        return Choice("eager", f"auto: kernels failed: {_failure}")
    best: Measurement | None = None
    for row in _measured:
        same = (row.mechanism, row.dtype, row.head_dim) == (
            work.mechanism,
            str(work.dtype).removeprefix("torch."),
            work.head_dim,
        )
        if same and row.length <= work.length and (best is None or row.length > best.length):
            best = row
    if best is None:
        return Choice("eager", "auto: kernels not yet measured for this call")
    said = f"{best.speedup:.2g} times the speed of eager at N = {best.length} on {best.device}"
    return Choice("triton" if best.speedup > 1 else "eager", f"auto: kernels measured {said}")


def report_failure(error: Exception, required: bool) -> None:
    """A kernel did not compile or did not launch: say so, once.

    Args:
        error: What it raised.
        required: Whether nothing else may run in its place.

    Raises:
        KernelError: ``required``, with the cause.
    """
    global _failure
    cause = error
    while cause.__cause__ is not None and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    lines = str(cause).strip().splitlines() or [""]
    text = f"{type(cause).__name__}: {lines[-1]}"
    if required:
        raise KernelError(f"the fused attention kernels failed: {text}") from error
    if _failure is None:
        _failure = text
        warnings.warn(
            f"the fused attention kernels failed, the formulas run instead: {text}", stacklevel=3
        )
