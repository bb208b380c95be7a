"""A task in several processes: spread over them, split between them, its state in one piece."""

import contextlib
import re
from argparse import BooleanOptionalAction
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from vitlinear.cli.device import DeviceConfig
from vitlinear.cli.flags import COUNT
from vitlinear.cli.parser import Parser
from vitlinear.data.bad_images import UNREADABLE
from vitlinear.errors import UserError
from vitlinear.processes import Processes

from .compilation import CompileConfig, compile_arguments
from .optimiser import OptimiserConfig

# The names that timm's and our models give to the rows of what repeats.
BLOCK = re.compile(r"(^|\.)(blocks|layers)\.\d+$")

# Compared with whole tensors, these take the same steps on tensors in parts. Others fail there
# (adafactor, mars, the cautious ones) or, worse, do not (muon is off by the size of a step).
OPTIMISERS_OF_PARTS = {
    *("adam", "adamw", "nadam", "nadamw", "radam", "adabelief", "adopt", "madgradw", "lamb"),
    *("sgd", "momentum", "sgdw", "lars", "lion", "rmsprop"),
}


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over processes."""

    sync_bn: bool
    dist_bn: str
    fsdp: bool
    rows: int
    dist_timeout: int


def add_parallel_flags(parser: Parser) -> None:
    """Adds the flags of `ParallelConfig`."""
    group = parser.group("several processes")
    group.add_argument(
        "--sync-bn",
        action=BooleanOptionalAction,
        default=False,
        help="BatchNorm over the images of all GPUs",
    )
    group.add_argument(
        "--dist-bn",
        default="reduce",
        choices=("", "broadcast", "reduce"),
        help="BatchNorm statistics, and centroids of routing, after an epoch: '' leaves each "
        "process its own",
    )
    group.add_argument(
        "--fsdp", action=BooleanOptionalAction, default=False, help="split the model over them"
    )
    group.add_argument(
        "--rows",
        type=COUNT,
        default=1,
        metavar="R",
        help="split the rows of each image over R neighbouring processes",
    )
    group.add_argument(
        "--dist-timeout", type=COUNT, default=600, metavar="S", help="longest wait for another"
    )


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """Returns the model with batch norms that take their statistics over all processes."""
    if device.type != "cuda":
        raise UserError(f"--sync-bn works between GPUs only, not on {device}: --no-sync-bn")
    # timm's own, which knows its layers of normalisation and activation in one
    return convert_sync_batchnorm(model)


def check_sharding(optimiser: OptimiserConfig, device: DeviceConfig, processes: Processes) -> None:
    """Refuses what ``--fsdp`` cannot be combined with.

    Raises:
        UserError: Says what.
    """
    if not processes.distributed:
        raise UserError("--fsdp splits a model between processes: start several, with torchrun")
    if device.autocast_dtype is torch.float16:
        raise UserError("--fsdp does not scale float16 losses: use --amp-dtype bfloat16")
    if optimiser.opt not in OPTIMISERS_OF_PARTS:
        raise UserError(
            f"--opt {optimiser.opt} is not known to work with --fsdp; "
            f"{', '.join(sorted(OPTIMISERS_OF_PARTS))} are"
        )
    if optimiser.clip_grad and optimiser.clip_mode == "agc":
        raise UserError("--clip-mode agc needs whole tensors: with --fsdp, use norm or value")


def distribute(
    task: TrainingTask,
    device: torch.device,
    compilation: CompileConfig,
    *,
    distributed: bool,
    sharded: bool,
    dtype: torch.dtype | None,
) -> None:
    """Compiles a task and spreads it over the processes.

    After this the task's parameters are final: build the optimiser from them.

    Args:
        task: With the average of its weights, if it is to have one.
        device: Of this process.
        compilation: What is compiled: the whole model, or its blocks if it is split.
        distributed: Whether there are other processes.
        sharded: Whether the model is split between them, as `check_sharding` allows it.
        dtype: Of autocast, None without.
    """
    backend, mode = compilation.torchcompile, compilation.torchcompile_mode
    if sharded:
        for ema in (False, True) if task.has_ema() else (False,):
            model = unwrap_model(task.get_trainable_module(ema=ema))
            if backend:
                for block in _blocks(model):
                    block.compile(**compile_arguments(block, backend, mode))
            shard(model, device, dtype)
        return
    if backend:
        model = unwrap_model(task.get_trainable_module())
        task.compile(**compile_arguments(model, backend, mode))
    if distributed:
        task.prepare_distributed(device_ids=[device] if device.type == "cuda" else None)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    return (module for name, module in model.named_modules() if BLOCK.search(name))


def shard(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Splits parameters, gradients and so the optimiser's state over all processes (FSDP2).

    In place, block by block: a process holds one block whole at a time.

    Args:
        model: On its device, with equal weights in every process.
        device: Of this process.
        dtype: What whole parameters are cast to, under autocast of the same type; gradients are
            still summed in float32, and batch normalisation, whose statistics are float32, keeps
            that throughout.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False
    )
    if dtype is not None:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                fully_shard(module, mesh=mesh)
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.register_forward_pre_hook(_share_statistics)


def _share_statistics(model: nn.Module, _: Any) -> None:
    """Gives every process the first one's running statistics, as DDP does in each forward pass."""
    if not model.training:
        return
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([buffer.detach().flatten().float() for buffer in buffers])
    distributed.broadcast(flat, 0)
    for buffer, value in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(value.view_as(buffer))


def in_step(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    input_size: tuple[int, int, int],
    device: torch.device,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the batches of this process, and as many blank ones as others have more.

    Streams may end earlier in one process than in another. A split model is put together by all
    processes in each forward pass: one that had ended would leave the others waiting.

    Args:
        batches: Images and labels.
        input_size: Channels, height and width of an image.
        device: Where batches are.
    """
    own = iter(batches)
    while True:
        batch = next(own, None)
        left = torch.tensor(int(batch is not None), device=device)
        distributed.all_reduce(left, distributed.ReduceOp.MAX)
        if not left:
            return
        if batch is None:
            batch = (
                torch.zeros(1, *input_size, device=device),
                torch.full((1,), UNREADABLE, device=device),
            )
        yield batch


def wait_for_all() -> None:
    """Returns when all processes have called it."""
    if distributed.is_initialized():
        distributed.barrier()


@contextlib.contextmanager
def first_process_first(processes: Processes) -> Iterator[None]:
    """Has the first process of each machine run the block before the others do."""
    if processes.local_rank:
        wait_for_all()
    yield
    if not processes.local_rank:
        wait_for_all()


def full_state(task: TrainingTask, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns weights, average, the task's own state and the optimiser's, in whole tensors.

    All processes must call it. What one process wrote with it, any number can load.

    Returns:
        ``state_dict``, where they exist ``state_dict_ema`` and ``task_state``, and ``optimizer``:
        just what task and optimiser give, unless the model is sharded. Then tensors are on the
        CPU, and None in all processes but the first.
    """
    state = dict(task.get_checkpoint_state())
    if task.has_ema():
        state |= task.get_checkpoint_state(ema=True)
    state["optimizer"] = optimizer.state_dict()
    return tree_map_only(DTensor, _whole, state)


def _whole(tensor: DTensor) -> torch.Tensor | None:
    whole = tensor.full_tensor()  # an exchange in which all processes take part
    return whole.cpu() if distributed.get_rank() == 0 else None


def load_full_state(
    task: TrainingTask, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Puts back what `full_state` returned, into a task that is sharded or not.

    Raises:
        RuntimeError, ValueError, KeyError, IndexError: The state is of another model or optimiser.
    """
    for ema, suffix in (False, ""), (True, "_ema"):
        if ema and not task.has_ema():
            continue
        own = unwrap_model(task.get_eval_model(ema=ema)).state_dict()
        theirs = state[f"state_dict{suffix}"]
        if list(own) != list(theirs) and set(own) == set(theirs):
            # The optimiser's state knows parameters by their place.
            raise ValueError("its parameters are in the order of an earlier version of vitlinear")
        weights = {
            name: _part(tensor, own.get(name))
            for name, tensor in state[f"state_dict{suffix}"].items()
        }
        task.load_checkpoint_state(weights, state.get(f"task_state{suffix}"), ema=ema)
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    slots = {
        index: {name: _part(value, parameters[index]) for name, value in slot.items()}
        for index, slot in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**state["optimizer"], "state": slots})


def _part(value: Any, like: torch.Tensor | None) -> Any:
    """Returns this process's part of a whole tensor, if ``like`` is one of its shape in parts."""
    if not isinstance(like, DTensor) or getattr(value, "shape", None) != like.shape:
        return value
    mesh, placements = like.device_mesh, like.placements
    # no source: every process has read the whole
    return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)
