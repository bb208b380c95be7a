"""The ``doctor`` command: versions, devices, backends, and what `auto` would do here and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import vitlinear
from vitlinear.cards.info import check_name
from vitlinear.cli.device import choose_device
from vitlinear.cli.flags import COUNT, from_arguments
from vitlinear.cli.parser import Parser
from vitlinear.create import build_model, data_config
from vitlinear.errors import UserError
from vitlinear.ops import backend, gpu, kernel_cache
from vitlinear.ops.measurements import seeds
from vitlinear.processor import cpu_model
from vitlinear.report import backend_report

from .command import DTYPES

PACKAGES = ("torch", "timm", "numpy")
VARIABLES = (
    backend.ENVIRONMENT_VARIABLE, backend.CHECK_VARIABLE, "VITLINEAR_AUTOTUNE", "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES", "XDG_CACHE_HOME",
)  # fmt: skip


@dataclass(frozen=True)
class DoctorConfig:
    """The flags of ``vitlinear doctor``."""

    model: str | None
    size: int | None
    batch_size: int
    dtype: str
    device: str | None
    training: bool


def parse_arguments(argv: Sequence[str] | None, prog: str = "vitlinear doctor") -> DoctorConfig:
    """Returns the configuration that a command line asks for."""
    parser = Parser(
        prog=prog,
        description="Prints versions, devices, backends, what the backend `auto` would do and "
        "why, and what is known of the kernels here. Nothing is computed.",
    )
    parser.add_argument(
        "model", nargs="?", default=None, metavar="MODEL", help="also its attentions, one a line"
    )
    parser.add_argument("--size", type=COUNT, default=None, metavar="N", help="square images")
    parser.add_argument("--batch-size", type=COUNT, default=1, metavar="N", help="images")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model")
    parser.add_argument(
        "--device", default=None, metavar="DEV", help="default: cuda if it is there"
    )
    parser.add_argument("--training", action="store_true", help="as for a training step")
    return from_arguments(DoctorConfig, parser.parse_args(argv))


def main(argv: Sequence[str] | None, prog: str = "vitlinear doctor") -> None:
    """Runs ``vitlinear doctor``."""
    config = parse_arguments(argv, prog)
    if config.model is not None:
        check_name(config.model)
    device = choose_device(config.device)
    for title, lines in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("backends", _backends(device)),
        ("auto", _automatic(device)),
        ("cache", _cache(device)),
    ):
        for line in lines:
            print(f"{title:<10}{line}")
            title = ""
    if config.model is not None:
        print(f"\n{_model(config, device)}")


def _versions() -> Iterator[str]:
    yield f"vitlinear {vitlinear.__version__}, Python {platform.python_version()}"
    yield ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    made_for = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    triton = gpu.triton_version()
    yield f"torch is made for {made_for}; " + (f"triton {triton}" if triton else "no triton")
    for name in VARIABLES:
        if name in os.environ:
            yield f"{name}={os.environ[name]}"


def _devices() -> Iterator[str]:
    yield f"cpu: {cpu_model()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()}"
    if not torch.cuda.is_available():
        yield "no GPU: torch sees none"
    for index in range(torch.cuda.device_count()):
        here, memory = gpu.describe(index), torch.cuda.get_device_properties(index).total_memory
        yield (
            f"cuda:{index}: {here.name}, {here.architecture}, {memory / 2**30:.0f} GiB, "
            f"driver {here.driver}"
        )


def _backends(device: torch.device) -> Iterator[str]:
    yield "eager: runs everywhere"
    yield "library: runs everywhere but in ONNX"
    kind = backend.Workload(device.type, torch.float32, 1, 64, "elu").kind
    obstacle = backend.find_obstacle(kind)
    yield f"triton: cannot run on {device}: {obstacle}" if obstacle else f"triton: runs on {device}"


def _automatic(device: torch.device) -> Iterator[str]:
    try:
        choice = backend.requested_backend()
    except backend.VariableError as error:
        yield f"cannot decide: {error}"
        return
    if choice.backend != "auto":
        yield f"takes {choice.backend}: {choice.reason}"
        return
    if device.type not in gpu.DEVICES:
        yield f"takes eager on {device}: kernels need a GPU"
        return
    here = gpu.describe(device.index)
    if obstacle := gpu.obstacle(here):
        yield f"takes eager: {obstacle}"
        return
    try:
        checked = backend.check_mode()
    except backend.VariableError as error:
        yield f"cannot decide: {error}"
        return
    known, shipped = kernel_cache.known(here), seeds(here.name).rows
    yield (
        f"takes the kernels where they are faster: {len(known.rows)} calls measured here, "
        f"{len(shipped)} shipped for this GPU"
    )
    yield (
        f"where nothing was measured: from {backend.LEAST_TOKENS} tokens of all heads and samples "
        f"on, in training from {backend.LEAST_TOKENS_IN_TRAINING}"
    )
    yield {
        "once": "checks each kind of call once, at its first call",
        "always": f"checks each kind of call in each process ({backend.CHECK_VARIABLE})",
        "0": f"checks nothing ({backend.CHECK_VARIABLE})",
    }[checked]


def _cache(device: torch.device) -> Iterator[str]:
    folder = kernel_cache.folder()
    if device.type not in gpu.DEVICES:
        files = len(list(folder.glob("*.json"))) if folder.is_dir() else 0
        yield f"{folder}: {files} files, none of them for {device}"
        return
    here = gpu.describe(device.index)
    path, known = kernel_cache.path_for(here), kernel_cache.known(here)
    yield f"{path}" + ("" if path.exists() else " (not there yet)")
    if not _can_write(folder):
        yield "cannot be written: each process finds everything out anew"
    failed = {label: reason for label, reason in known.checks.items() if reason}
    yield (
        f"kinds of call: {len(known.checks) - len(failed)} passed their check, {len(failed)} "
        f"failed; block sizes of {len(known.blocks)} kernels"
    )
    yield from (f"failed: {label}: {reason}" for label, reason in failed.items())


def _can_write(folder: Path) -> bool:
    """Whether files can be made in a folder, or in the first above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


def _model(config: DoctorConfig, device: torch.device) -> object:
    """The backend report of the model that was asked for."""
    assert config.model is not None
    model = build_model(config.model, sizes={"img_size": config.size})
    model = model.to(device, getattr(torch, config.dtype)).train(config.training)
    size = config.size or data_config(model, {}).input_size[-1]
    channels = int(getattr(model, "in_chans", 3))
    try:
        return backend_report(model, (config.batch_size, channels, size, size))
    except backend.VariableError:  # no fault of the model
        raise
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot trace {config.model} at {size} pixels: {error}") from error
