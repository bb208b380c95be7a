"""What a run is built from: model, data, task, optimiser and schedule, out of parsed flags."""

import argparse
import dataclasses
import os
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import random_seed, unwrap_model

from vitlinear import create as models
from vitlinear.checkpoints.card import Card
from vitlinear.cli.device import choose_device, make_autocast
from vitlinear.data import dataset as datasets
from vitlinear.data import loader as loaders
from vitlinear.data.bad_images import BadImages
from vitlinear.errors import UserError
from vitlinear.processes import join_processes

from .finetune import enable_checkpointing, freeze, initialise_head
from .loop import Updater, updates_per_epoch
from .optimisation import batch_size_note, make_optimizer, make_schedule
from .parallel import distribute, synchronised
from .start_weights import check_initial, initial_weights
from .tasks import check_task, make_task


@dataclasses.dataclass
class Run:
    """The parts of a training run.

    Attributes:
        args: Flags, with what the launcher adds (``rank``, ``world_size``, ``distributed``).
        device: Where it runs.
        task: Model, its moving average, and loss.
        updater: The optimiser's side.
        autocast: Returns the context of a forward pass.
        train_loader: Training batches.
        eval_loader: Held-out batches.
        epochs: Length of the schedule.
        updates_per_epoch: Optimiser updates in an epoch.
        card: What the weights files will say; epoch and metric are added later.
        notes: Lines for the user about what was decided.
        bad_images: Images that could not be read.
    """

    args: argparse.Namespace
    device: torch.device
    task: TrainingTask
    updater: Updater
    autocast: Any
    train_loader: Any
    eval_loader: Any
    epochs: int
    updates_per_epoch: int
    card: Card
    notes: list[str]
    bad_images: BadImages


def start_device(args: argparse.Namespace) -> torch.device:
    """Chooses the device, joins the process group of torchrun or SLURM, and sets its modes.

    Adds ``distributed``, ``world_size``, ``rank`` and ``local_rank`` to ``args``.
    """
    device = join_processes(args, choose_device(args.device))
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    elif device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    return device


def _num_classes(args: argparse.Namespace, names: list[str] | None) -> int:
    if names is None:
        if args.num_classes is None:
            raise UserError(f"{args.dataset} does not say how many classes it has: --num-classes N")
        return int(args.num_classes)
    if args.num_classes not in (None, len(names)):
        raise UserError(
            f"--num-classes {args.num_classes} does not match the data, which has {len(names)} "
            "classes: leave it out, or give all classes with --class-map"
        )
    return len(names)


def set_up(args: argparse.Namespace) -> Run:
    """Builds every part of a run; writes no file.

    Raises:
        UserError: Something in the flags or the data cannot work.
    """
    models.check_model_name(args.model)
    models.check_model_kwargs(args.model_kwargs)
    check_initial(args)
    check_task(args)
    device = start_device(args)
    random_seed(args.seed)  # the same initial weights in every process
    in_chans = args.input_size[0] if args.input_size else args.in_chans
    # Channels decide how images are read, and only the model knows its default number.
    mode = datasets.image_mode(in_chans or 3, args.input_img_mode)
    bad_images = BadImages(skip=args.bad_images == "skip")
    train_set = datasets.open_from_arguments(args, True, mode, bad_images)
    eval_set = datasets.open_from_arguments(args, False, mode, bad_images)
    names = datasets.class_names(train_set)
    datasets.check_same_classes(
        names, datasets.class_names(eval_set), "the training split", "the held-out split"
    )
    num_classes = _num_classes(args, names)

    flags = {
        "img_size": args.img_size,
        "input_size": args.input_size,
        "drop_rate": args.drop,
        "drop_path_rate": args.drop_path,
    }
    model = models.build_model(
        args.model,
        pretrained=args.pretrained,
        num_classes=num_classes,
        in_chans=in_chans,
        **{**flags, **args.model_kwargs},
    )
    notes = []
    start = args.initial_checkpoint
    if start and initial_weights(
        model, start, args.initial_model or args.model, args.initial_head_map
    ):
        notes.append(f"{start}: it has no classifier that fits, starting a new one")
    initialise_head(model, args.head_init_scale, args.head_init_bias)
    if args.freeze:
        notes.append(f"{freeze(model, args.freeze) / 1e6:.2f} M parameters are frozen")
    if args.grad_checkpointing:
        enable_checkpointing(model, args.model)
    config = models.data_config(model, vars(args))
    card = Card(
        model=args.model,
        model_kwargs={
            key: value
            for key, value in model._model_args.items()  # type: ignore[union-attr, operator]
            if key not in ("num_classes", "in_chans", "drop_rate", "drop_path_rate")
        },
        num_classes=num_classes,
        in_chans=config["input_size"][0],
        data_config=config,
        image_mode=mode,
        class_names=names,
        dataset=args.dataset,
    )
    train_loader = loaders.train_loader(train_set, args, config, num_classes, device)
    eval_loader = loaders.eval_loader(
        eval_set,
        batch_size=args.validation_batch_size or args.batch_size,
        data_config=config,
        workers=args.workers,
        device=device,
        distributed=args.distributed,
        pin_memory=args.pin_mem,
    )

    layout = torch.channels_last if args.channels_last else torch.preserve_format
    model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    if args.distributed and args.sync_bn:
        model = synchronised(model, device)
    updates = updates_per_epoch(len(train_loader), args.grad_accum_steps)
    task = make_task(args, model, config, names, device, updates)
    distribute(task, args, device)
    optimizer = make_optimizer(args, unwrap_model(task.get_trainable_module()))
    scheduler, epochs = make_schedule(args, optimizer, updates)
    scaled = args.amp and args.amp_dtype == "float16"
    updater = Updater(
        task,
        optimizer,
        scheduler,
        torch.amp.GradScaler(device=device.type) if scaled else None,
        accumulate=args.grad_accum_steps,
        clip_grad=args.clip_grad or None,
        clip_mode=args.clip_mode,
        ema=args.model_ema,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    notes.append(
        f"{args.model}: {parameters / 1e6:.2f} M parameters, input {config['input_size']}, "
        f"{num_classes} classes; {len(train_set)} training and {len(eval_set)} held-out images; "
        f"{device}, {args.world_size} process(es)"
    )
    if note := batch_size_note(args, args.world_size):
        notes.append(note)
    return Run(
        args, device, task, updater, make_autocast(args, device), train_loader, eval_loader,
        epochs, updates, card, notes, bad_images,
    )  # fmt: skip
