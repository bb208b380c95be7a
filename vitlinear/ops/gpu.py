"""The GPU that a call runs on: what it is called, and whether the kernels are made for it.

What another device would answer differently stands here, so that tests can put one in its place.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import re
from typing import NamedTuple

import torch

# Types of devices on which `auto` considers the kernels.
DEVICES = ("cuda",)
LEAST_CAPABILITY = (8, 0)  # of NVIDIA: bfloat16 and TF32 products, asynchronous copies
ARCHITECTURES = ("gfx90a", "gfx942")  # of AMD: those that the kernels are compiled for in tests
LEAST_TRITON = (3, 6)  # older ones have not been tried


class Gpu(NamedTuple):
    """A GPU and what runs it.

    Attributes:
        name: As the driver calls it.
        architecture: ``sm_90``, or of AMD ``gfx942``.
        capability: Compute capability of NVIDIA; of AMD the digits of the architecture.
        driver: Its version.
        triton: Version of Triton; empty without.
    """

    name: str
    architecture: str
    capability: tuple[int, int]
    driver: str
    triton: str


def is_there() -> bool:
    """Whether PyTorch finds one. Fake tensors may be on a GPU that is not there."""
    return torch.cuda.is_available()


@functools.cache
def describe(index: int | None = None) -> Gpu:
    """The GPU of this number, by default the current one."""
    properties = torch.cuda.get_device_properties(
        torch.cuda.current_device() if index is None else index
    )
    major, minor = properties.major, properties.minor
    architecture = f"sm_{major}{minor}"
    if torch.version.hip:
        architecture = properties.gcnArchName.partition(":")[0]
    return Gpu(properties.name, architecture, (major, minor), driver_version(), triton_version())


def obstacle(gpu: Gpu) -> str | None:
    """The reason why `auto` does not take the kernels on a GPU at all; None if it may."""
    numbers = re.match(r"(\d+)\.(\d+)", gpu.triton)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < LEAST_TRITON:
        least = ".".join(map(str, LEAST_TRITON))
        return f"they need triton {least}, and {gpu.triton or 'an unknown version'} is here"
    if gpu.architecture.startswith("gfx"):
        if gpu.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            return f"they are compiled for {known}, and not tried on {gpu.architecture}"
    elif gpu.capability < LEAST_CAPABILITY:
        needs, has = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, gpu.capability))
        return f"they need compute capability {needs}, and {gpu.name} has {has}"
    return None


def is_capturing() -> bool:
    """Whether the current stream is recorded into a graph, where nothing else may run."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@functools.cache
def triton_version() -> str:
    """Version of Triton, under any of the names that it is packaged by; empty without."""
    for name in ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


@functools.cache
def driver_version() -> str:
    """Version of the driver; that of HIP on AMD; ``unknown`` where nothing tells."""
    if torch.version.hip:
        return str(torch.version.hip)
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if library.nvmlInit_v2() == 0:
            found = library.nvmlSystemGetDriverVersion(text, len(text)) == 0
            library.nvmlShutdown()
            if found:
                return text.value.decode()
    except (OSError, AttributeError):
        pass
    return "unknown"
