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
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from vitlinear.errors import UserError
from vitlinear.models._contract import TimmBackbone
from vitlinear.parallel import parallelize, shard_rows
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


def last_stride(model: nn.Module) -> int:
    """Returns the pixels in a row of the model's last map."""
    return max(int(level["reduction"]) for level in model.feature_info)  # type: ignore[union-attr]


def check_rows(model: nn.Module, height: int, processes: Processes) -> None:
    """Refuses images that have fewer rows at the model's last stride than processes share them.

    Args:
        model: What is trained.
        height: Rows of its images.
        processes: How many share an image.

    Raises:
        UserError: Says how many may.
    """
    if processes.rows == 1:
        return
    if not isinstance(model, TimmBackbone):
        raise UserError("--rows splits images for models of vitlinear alone")
    stride = last_stride(model)
    most = height // stride if model.rounds_down else math.ceil(height / stride)
    if most < processes.rows:
        raise UserError(
            f"--rows {processes.rows} needs a row for each process at the model's last stride, "
            f"{stride}, and images of {height} rows have {most} there: lower --rows, or give "
            "larger images (--img-size)"
        )


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
    stride = last_stride(unwrap_model(task.get_trainable_module()))
    mesh = make_mesh(processes, device, timeout)["rows"]
    for ema in (False, True) if task.has_ema() else (False,):
        parallelize(unwrap_model(task.get_trainable_module(ema=ema)), mesh)

    @contextlib.contextmanager
    def share(images: Tensor) -> Iterator[Tensor]:
        part, rows = shard_rows(images, mesh, multiple=stride)
        with rows:
            yield part

    return share
