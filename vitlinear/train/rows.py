"""The rows of each image over several processes (``--rows``): the groups, the model, the batches.

Neighbouring processes form a group that shares images, and the groups share the data: the mesh of
the processes has the axes (data, rows). The processes of a group read the same images, changed and
mixed alike. What is dropped of whole images the first of them draws for all, by the seed that one
process would have; places each draws by itself.

All processes of a group compute the same loss, from logits that all of them have. The sum of these
losses over a group is what their backward passes work on together, and DDP and FSDP take the mean
of the gradients over all processes: the gradients are those of one process per group.
"""

import contextlib
import datetime
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh

from vitlinear.processes import Processes

# Images [B, C, H, W] of a group to the context of their forward and backward pass, which gives
# this process's rows of them.
Share = Callable[[Tensor], AbstractContextManager[Tensor]]


def make_mesh(processes: Processes, device: torch.device, timeout: float) -> DeviceMesh:
    """Makes the groups of processes that share images, and those that share data.

    All processes must call it.

    Args:
        processes: How many share an image.
        device: Of this process.
        timeout: Longest wait for another process in seconds.

    Returns:
        A mesh with the axes ``data`` and ``rows``.
    """
    ranks = torch.arange(processes.world_size).view(-1, processes.rows)
    wait = datetime.timedelta(seconds=timeout)
    groups = [
        distributed.new_subgroups_by_enumeration(lines.tolist(), timeout=wait)[0]
        for lines in (ranks.T, ranks)
    ]
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("data", "rows"))


def share_images(
    task: TrainingTask, processes: Processes, device: torch.device, timeout: float
) -> Share:
    """Has the models of a task work on rows of images, if that is asked for.

    Args:
        task: Its model, and the average of its weights, are changed in place.
        processes: How many share an image.
        device: Of this process.
        timeout: Longest wait for another process in seconds.

    Raises:
        UserError: A layer cannot be split; its name is told.
    """
    if processes.rows == 1:
        return contextlib.nullcontext
    from vitlinear.parallel import parallelize, shard_rows

    mesh = make_mesh(processes, device, timeout)["rows"]
    for ema in (False, True) if task.has_ema() else (False,):
        parallelize(unwrap_model(task.get_trainable_module(ema=ema)), mesh)

    @contextlib.contextmanager
    def share(images: Tensor) -> Iterator[Tensor]:
        part, rows = shard_rows(images, mesh)
        with rows:
            yield part

    return share
