"""The parts of a run, built from its configuration: model, data, task, optimiser, schedule."""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import random_seed, unwrap_model
from torch import nn

from vitlinear.checkpoints.card import Card
from vitlinear.cli.device import choose_device, make_autocast
from vitlinear.create import (
    Preprocessing,
    check_model_kwargs,
    check_model_name,
    data_config,
    registered_name,
)
from vitlinear.data.bad_images import BadImages
from vitlinear.data.class_names import check_same_classes, classes_of
from vitlinear.data.dataset import data_notes, image_mode, open_split
from vitlinear.data.loader import eval_loader, train_loader
from vitlinear.errors import UserError
from vitlinear.processes import Processes, join_processes

from .average import add_average
from .config import TrainConfig
from .freezing import freeze
from .loop import updates_per_epoch
from .make_model import enable_checkpointing, make_model, shape_arguments
from .optimiser import make_optimizer
from .parallel import check_sharding, distribute, first_process_first, synchronised
from .rows import Share, check_rows, share_images
from .schedule import batch_size_note, learning_rate, make_schedule, shape_notes
from .start_weights import check_initial, initial_weights, initialise_head, normalisation_note
from .tasks import check_task, make_task
from .updater import Updater


@dataclasses.dataclass
class Run:
    """The parts of a training run.

    Attributes:
        config: What was asked for.
        device: Where it runs.
        processes: This process among those of the run.
        task: Model, its moving average, and loss.
        updater: The optimiser's side.
        autocast: Returns the context of a forward pass.
        share: Returns the context that gives this process's part of the images.
        train_loader: Training batches.
        eval_loader: Held-out batches.
        epochs: Length of the schedule.
        updates_per_epoch: Optimiser updates in an epoch.
        card: What the weights files will say; epoch and metric are added later.
        notes: Lines for the user about what was decided.
        bad_images: Images that could not be read.
    """

    config: TrainConfig
    device: torch.device
    processes: Processes
    task: TrainingTask
    updater: Updater
    autocast: Any
    share: Share
    train_loader: Any
    eval_loader: Any
    epochs: int
    updates_per_epoch: int
    card: Card
    notes: list[str]
    bad_images: BadImages

    @property
    def images_per_batch(self) -> int:
        """Images in a batch of all processes together."""
        return self.config.schedule.batch_size * self.processes.data_size

    @property
    def images(self) -> int:
        """Images in the training set; a stream's length is rounded to batches of each worker."""
        dataset = self.train_loader.dataset
        return getattr(getattr(dataset, "reader", None), "num_samples", None) or len(dataset)


def set_up(config: TrainConfig, resumes: bool = False) -> Run:
    """Builds every part of a run; writes no file.

    Args:
        config: What is asked for.
        resumes: Whether a state goes over the weights, which then start from nothing: those that
            the run once started from may be gone.

    Raises:
        UserError: Something in the flags or the data cannot work.
    """
    asked = config
    if resumes:
        config = without_start_weights(config)
    _check(config)
    device, processes = join_processes(
        choose_device(config.device.device), config.parallel.dist_timeout, config.parallel.rows
    )
    if config.parallel.fsdp:
        check_sharding(config.optimiser, config.device, processes)
    _set_modes(device, config.run.deterministic)
    random_seed(config.run.seed)  # the same initial weights in every process

    # Channels decide how images are read, and only the model knows its default number.
    mode = image_mode(config.input.channels or 3, config.data.input_img_mode)
    bad_images = BadImages.by_flag(config.bad_images)
    downloads = config.data.dataset_download
    with first_process_first(processes) if downloads else contextlib.nullcontext():
        train_set, eval_set = (_open(config, train, mode, bad_images) for train in (True, False))
    names = classes_of(train_set)
    check_same_classes(names, classes_of(eval_set), "the training split", "the held-out split")
    num_classes = _num_classes(config.model.num_classes, names, config.data.dataset)

    model, notes = _start_model(config, num_classes)
    notes += data_notes(train_set, eval_set, num_classes)
    input = data_config(model, {**config.input.given(), "model_kwargs": config.model.model_kwargs})
    check_rows(model, input.input_size[1], processes)
    if note := normalisation_note(config.start.initial_checkpoint, input):
        notes.append(note)
    card = Card(
        model=registered_name(model, check_model_name(config.model.model)),
        model_kwargs=shape_arguments(model),
        num_classes=num_classes,
        in_chans=input.input_size[0],
        data_config=input,
        image_mode=mode,
        class_names=names,
        dataset=config.data.dataset,
    )
    batches, held_out = _make_loaders(
        config, train_set, eval_set, input, num_classes, device, processes
    )

    model.to(device=device, memory_format=config.device.memory_format)  # type: ignore[call-overload]
    if processes.distributed and config.parallel.sync_bn:
        model = synchronised(model, device)
    if config.start.freeze:  # after that, which makes norms anew
        frozen = freeze(model, config.start.freeze)
        shown = f"{frozen / 1e6:.2f} M" if frozen >= 1e4 else str(frozen)
        notes.append(f"{shown} parameters are frozen")
    accumulate = config.optimiser.grad_accum_steps
    updates = updates_per_epoch(len(batches), accumulate)
    images = config.schedule.images_per_update(accumulate, processes.data_size)
    task = make_task(
        config.distillation,
        model,
        input,
        names,
        device,
        updates_per_epoch=updates,
        smoothing=config.augmentation.smoothing,
        mixes=config.augmentation.mixes,
        memory_format=config.device.memory_format,
    )
    # fused operations take no mixture of whole and split tensors
    add_average(task, config.average, images, foreach=not config.parallel.fsdp)
    share = share_images(task, processes, device, config.parallel.dist_timeout)
    distribute(
        task,
        device,
        config.compilation,
        distributed=processes.distributed,
        sharded=config.parallel.fsdp,
        dtype=config.device.autocast_dtype,
    )
    optimizer = make_optimizer(
        config.optimiser,
        unwrap_model(task.get_trainable_module()),
        learning_rate(config.schedule, images),
    )
    scheduler, epochs = make_schedule(config.schedule, optimizer, updates, images)
    scaled = config.device.autocast_dtype is torch.float16
    updater = Updater(
        task,
        optimizer,
        scheduler,
        torch.amp.GradScaler(device=device.type) if scaled else None,
        accumulate=accumulate,
        clip_grad=config.optimiser.clip_grad or None,
        clip_mode=config.optimiser.clip_mode,
        ema=config.average.model_ema,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    notes.append(
        f"{card.model}: {parameters / 1e6:.2f} M parameters, input {input.input_size}, "
        f"{num_classes} classes; {len(train_set)} training and {len(eval_set)} held-out images; "
        f"{device}, {processes.world_size} process(es)"
    )
    if note := batch_size_note(config.schedule, accumulate, processes.data_size, processes.rows):
        notes.append(note)
    notes += shape_notes(config.schedule, images)
    return Run(
        config=asked,
        device=device,
        processes=processes,
        task=task,
        updater=updater,
        autocast=make_autocast(config.device, device),
        share=share,
        train_loader=batches,
        eval_loader=held_out,
        epochs=epochs,
        updates_per_epoch=updates,
        card=card,
        notes=notes,
        bad_images=bad_images,
    )


def _check(config: TrainConfig) -> None:
    """Refuses what cannot work before anything is built."""
    check_model_name(config.model.model)
    check_model_kwargs(config.model.model_kwargs)
    check_initial(config.start, config.model.pretrained)
    check_task(
        config.distillation,
        averages=config.average.model_ema,
        sharded=config.parallel.fsdp,
        rows=config.parallel.rows,
    )


def without_start_weights(config: TrainConfig) -> TrainConfig:
    """Returns the same configuration of a model that starts from no weights."""
    start = dataclasses.replace(
        config.start, initial_checkpoint=None, initial_model=None, initial_head_map=None
    )
    model = dataclasses.replace(config.model, pretrained=False)
    return dataclasses.replace(config, model=model, start=start)


def _set_modes(device: torch.device, deterministic: bool) -> None:
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    elif device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True


def _open(config: TrainConfig, train: bool, mode: str, bad_images: BadImages) -> Any:
    return open_split(
        config.data,
        config.train_split if train else config.data.val_split,
        train=train,
        mode=mode,
        batch_size=config.schedule.batch_size,
        num_classes=config.model.num_classes,
        seed=config.run.seed if train else None,
        bad_images=bad_images,
    )


def _num_classes(asked: int | None, names: Sequence[str] | None, dataset: str | None) -> int:
    if names is None:
        if asked is None:
            raise UserError(f"{dataset} does not say how many classes it has: --num-classes N")
        return asked
    if asked not in (None, len(names)):
        raise UserError(
            f"--num-classes {asked} does not match the data, which has {len(names)} "
            "classes: leave it out, or give all classes with --class-map"
        )
    return len(names)


def _start_model(config: TrainConfig, num_classes: int) -> tuple[nn.Module, list[str]]:
    """Returns the model with the weights that it starts from, and lines about them."""
    start, name = config.start, check_model_name(config.model.model)
    model = make_model(config.model, config.regularisation, config.input, num_classes)
    notes = []
    path = start.initial_checkpoint
    if path and initial_weights(model, path, start.initial_model or name, start.initial_head_map):
        notes.append(f"{path}: it has no classifier that fits, starting a new one")
    initialise_head(model, start.head_init_scale, start.head_init_bias)
    if config.regularisation.grad_checkpointing:
        enable_checkpointing(model, name)
    return model, notes


def _make_loaders(
    config: TrainConfig,
    train_set: Any,
    eval_set: Any,
    input: Preprocessing,
    num_classes: int,
    device: torch.device,
    processes: Processes,
) -> tuple[Any, Any]:
    batch_size = config.schedule.batch_size
    training = train_loader(
        train_set,
        config.augmentation,
        input,
        num_classes,
        device,
        batch_size=batch_size,
        workers=config.data.workers,
        pin_memory=config.data.pin_mem,
        rank=processes.data_rank,
        world_size=processes.data_size,
    )
    held_out = eval_loader(
        eval_set,
        batch_size=config.run.validation_batch_size or batch_size,
        data_config=input,
        workers=config.data.workers,
        device=device,
        pin_memory=config.data.pin_mem,
        rank=processes.data_rank,
        world_size=processes.data_size,
    )
    return training, held_out
