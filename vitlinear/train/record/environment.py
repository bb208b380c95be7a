"""The software and hardware of a run: ``environment.json``, an entry for each of its starts."""

import datetime
import json
import os
import platform
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import vitlinear
from vitlinear.errors import UserError
from vitlinear.files import write_atomically, write_text
from vitlinear.processor import cpu_model
from vitlinear.revision import git, versions

from .folder import ENVIRONMENT

PACKAGES = (
    "torch", "torchvision", "timm", "triton", "numpy", "pillow", "safetensors", "datasets",
    "webdataset", "tensorboard", "wandb",
)  # fmt: skip
# Which variables bear on a run; every other one stays private. None of these holds a secret, and
# one whose name looks like it is left out all the same.
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES", "GROUP_RANK",
    "KMP_AFFINITY", "LD_PRELOAD", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "MKL_NUM_THREADS", "OMP_NUM_THREADS", "PYTHONHASHSEED", "PYTHONPATH", "RANK",
    "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_CPUS_PER_TASK", "SLURM_JOB_ID",
    "SLURM_JOB_NAME", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_JOB_PARTITION",
    "SLURM_NTASKS", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID",
    "TRITON_INTERPRET", "WANDB_MODE", "WORLD_SIZE",
)  # fmt: skip
PREFIXES = ("VITLINEAR_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "TORCHINDUCTOR_")
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")
LARGEST_PATCH = 16 * 2**20  # bytes: more than that is not source code
LONGEST_LIST = 100


def record_start(
    folder: Path, device: torch.device, update: int = 0, command: Sequence[str] | None = None
) -> None:
    """Appends this start of a run to its ``environment.json``; saves changes git does not have.

    Args:
        folder: The run folder.
        device: Where the run computes.
        update: Updates done by earlier starts.
        command: The command line; by default this process's.

    Raises:
        UserError: The file is damaged or cannot be written.
    """
    path = folder / ENVIRONMENT
    starts = read_starts(path) if path.is_file() else []
    start = {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "update": update,
        "command": shlex.join(command or (sys.executable, *sys.argv)),
        "working_folder": os.getcwd(),
        **software(),
        **hardware(device),
        "variables": variables(os.environ),
        "git": repositories(folder),
    }
    write_text(path, json.dumps({"starts": [*starts, start]}, indent=2) + "\n")


def read_starts(path: Path) -> list[dict[str, Any]]:
    """Reads the entries of an ``environment.json``.

    Raises:
        UserError: It is not one.
    """
    try:
        return list(json.loads(path.read_text("utf-8"))["starts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); move it away") from error


def software() -> dict[str, Any]:
    """Returns versions: of Python, the packages a run may use, CUDA, cuDNN, the system."""
    return {
        "python": platform.python_version(),
        "packages": {"vitlinear": vitlinear.__version__, **versions(PACKAGES)},
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "os": platform.platform(),
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """Returns the host's name, processor, cores and memory, and this machine's GPUs."""
    gpus = []
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            gpus.append({"name": found.name, "memory_gib": round(found.total_memory / 2**30, 1)})
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "hostname": socket.gethostname(),
        "device": str(device),
        "gpus": gpus,
        "cpu": cpu_model(),
        "cores": {"machine": os.cpu_count(), "usable": usable, "torch": torch.get_num_threads()},
        "memory_gib": memory_gib(),
    }


def memory_gib() -> float | None:
    """Returns the machine's memory, or None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables that bear on a run, and no secrets."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if (name in VARIABLES or name.startswith(PREFIXES))
        and not any(word in name for word in SECRET)
    }


def repositories(folder: Path) -> list[dict[str, Any]]:
    """Returns the git state of vitlinear's checkout and of the working folder, where there is one.

    Args:
        folder: Where the differences to the commits go, as ``git.patch`` or, if that name holds
            another, ``git-2.patch`` and so on.

    Returns:
        For each ``root``, ``of`` (vitlinear, working folder), ``commit``, ``branch``, ``dirty``
        (tracked files differ from the commit; None if git cannot say), ``untracked`` (names) and
        ``patch`` (file name).
    """
    found: dict[str, dict[str, Any]] = {}
    source = Path(vitlinear.__file__).parent
    places = [("working folder", Path.cwd())]
    # An installed package may lie in an environment that lies in somebody's repository.
    if git(source, "ls-files", "--error-unmatch", "__init__.py") is not None:
        places.insert(0, ("vitlinear", source))
    for name, place in places:
        root = (git(place, "rev-parse", "--show-toplevel") or b"").decode().strip()
        if root in found:
            found[root]["of"].append(name)
        elif root:
            found[root] = {"root": root, "of": [name], **_state(Path(root), folder)}
    return list(found.values())


def _state(root: Path, folder: Path) -> dict[str, Any]:
    commit = git(root, "rev-parse", "--verify", "HEAD")
    branch = git(root, "symbolic-ref", "--short", "HEAD")
    others = git(root, "ls-files", "--others", "--exclude-standard", "--directory", "-z") or b""
    untracked = [name for name in others.decode(errors="replace").split("\0") if name]
    if len(untracked) > LONGEST_LIST:
        untracked[LONGEST_LIST:] = [f"... and {len(untracked) - LONGEST_LIST} more"]
    state: dict[str, Any] = {
        "commit": commit.decode().strip() if commit else None,
        "branch": branch.decode().strip() if branch else None,
        "dirty": None,
        "untracked": untracked,
    }
    if commit:
        patch = git(root, "diff", "HEAD", "--binary", "--no-ext-diff", "--no-textconv")
        if patch is not None:
            state["dirty"] = bool(patch)
            if patch and len(patch) <= LARGEST_PATCH:
                state["patch"] = _save_patch(patch, folder)
    return state


def _save_patch(patch: bytes, folder: Path) -> str:
    """Writes a difference under the first free name, or finds it; returns the name."""
    number = 1
    while True:
        name = "git.patch" if number == 1 else f"git-{number}.patch"
        path = folder / name
        if not path.exists():
            write_atomically(path, lambda temporary: temporary.write_bytes(patch))
            return name
        if path.read_bytes() == patch:
            return name
        number += 1
