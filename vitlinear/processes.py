"""The processes of a run: joining and leaving the group that torchrun or SLURM started."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import is_distributed_env
from timm.utils.distributed import world_info_from_env
from torch import distributed

from vitlinear.errors import LostPeerError, UserError, one_line
from vitlinear.signals import Stopped

# Held to the end of the process. If the last reference to a group is DDP's, its destructor joins
# gloo's threads while holding the interpreter lock that they may be waiting for: seen as two runs
# in three that finished all epochs and never exited.
_PROCESS_GROUPS: list[Any] = []


@dataclass(frozen=True)
class Processes:
    """This process among those of a run; by default the only one.

    Neighbouring processes may share images: each of them has some rows of every image. Such groups
    share the data.

    Attributes:
        rank: Number of this process, from 0. The first is the one that prints and writes.
        world_size: Number of processes.
        local_rank: Number of this process among those of its machine.
        rows: Number of processes that share an image.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    rows: int = 1

    @property
    def distributed(self) -> bool:
        """Whether there are others."""
        return self.world_size > 1

    @property
    def data_rank(self) -> int:
        """Number of this process's group among those that share the data."""
        return self.rank // self.rows

    @property
    def data_size(self) -> int:
        """Number of groups that share the data."""
        return self.world_size // self.rows

    @property
    def row(self) -> int:
        """Number of this process among those that share an image, from the top."""
        return self.rank % self.rows


def join_processes(
    device: torch.device, timeout: float, rows: int = 1
) -> tuple[torch.device, Processes]:
    """Joins the process group of torchrun or SLURM, if this process was started by one.

    Args:
        device: As asked for; between processes, its index is the process's own.
        timeout: Longest time in seconds that processes wait for each other.
        rows: Number of processes that share an image.

    Returns:
        The device of this process, and its place among the others.

    Raises:
        UserError: There is no GPU for this process, the others cannot be reached, or their number
            is no multiple of ``rows``.
    """
    local_rank, rank, world_size = world_info_from_env() if is_distributed_env() else (0, 0, 1)
    if world_size % rows:
        raise UserError(
            f"--rows {rows} splits each image over {rows} processes, and there are {world_size}: "
            f"start a multiple of {rows}, with torchrun"
        )
    processes = Processes(rank, world_size, local_rank, rows)
    if is_distributed_env() and device.type == "cuda":
        device = own_gpu()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if processes.distributed:
        _join(processes, device, timeout)
    return device, processes


def _join(processes: Processes, device: torch.device, timeout: float) -> None:
    rank, world_size = processes.rank, processes.world_size
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"{world_size} processes, but {name} is not set: start them with torchrun, or "
                "under SLURM as tools/slurm/train.sbatch does"
            )
    try:
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method="env://",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {rank} of {world_size} could not join the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {one_line(error)[:200]}"
        ) from error
    _PROCESS_GROUPS.append(distributed.group.WORLD)


def own_gpu() -> torch.device:
    """Returns the GPU of this process; SLURM may show each process only its own.

    Raises:
        UserError: There is none.
    """
    local_rank, count = world_info_from_env()[0], torch.cuda.device_count()
    if local_rank < count:
        return torch.device("cuda", local_rank)
    if count == 1 and os.environ.get("SLURM_PROCID"):
        return torch.device("cuda", 0)
    raise UserError(
        f"process {local_rank} of this machine has no GPU, {count} are visible: "
        "start one process per GPU"
    )


def lost_peer(error: BaseException) -> LostPeerError | None:
    """Returns the one-line error of a failed exchange between processes, else None."""
    # gloo's errors have no class of their own
    if not isinstance(error, distributed.DistError) and not (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    ):
        return None
    return LostPeerError(f"this process lost another ({one_line(error).rsplit('] ', 1)[-1][:200]})")


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Leaves the process group that the block may join.

    Raises:
        LostPeerError: In place of a failed exchange between processes.
    """
    try:
        yield
    except RuntimeError as error:
        if lost := lost_peer(error):
            raise lost from error
        raise
    except Stopped:  # all of them, together
        _leave()
        raise
    # Not after an error: leaving in order could wait for processes that will not come.
    _leave()


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
