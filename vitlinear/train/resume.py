"""Resuming a run: the state to go on from, whether it is of the same run, and the place in it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.data import IterableImageDataset
from timm.utils import unwrap_model
from torch import distributed

from vitlinear.checkpoints.load import misfit
from vitlinear.cli.config_file import saved_arguments
from vitlinear.data.class_names import check_same_classes
from vitlinear.errors import UserError, one_line
from vitlinear.processes import Processes

from .parallel import load_full_state
from .record.folder import ARGUMENTS, STATE, FolderConfig, run_folder
from .record.saved_state import read_newest, read_state
from .setup import Run

# A resumed run that differs in one of these is another run.
FIXED_ON_RESUME = (
    "model", "model_kwargs", "model_ema", "seed", "opt",
    # what the optimiser's state holds would go over these
    "opt_eps", "opt_betas", "opt_kwargs", "momentum", "weight_decay", "weight_decay_1d",
    "layer_decay", "freeze",
    # by which the best epoch so far was chosen
    "eval_metric",
)  # fmt: skip
# What else decides the shapes of a model's weights.
SIZES = ("img_size", "input_size", "in_chans")
# A run does not become another by these.
LOCATION_KEYS = frozenset({"output", "experiment", "pin_mem"})


@dataclasses.dataclass
class Start:
    """Where a run starts or goes on.

    Attributes:
        epoch: Epochs done.
        batch: Batches of the next one done.
        progress: Numbers of these batches, None where there are none.
        lr: Learning rate that the epoch began with, None where it has not.
        best: Best held-out metric so far.
    """

    epoch: int = 0
    batch: int = 0
    progress: dict[str, Any] | None = None
    lr: float | None = None
    best: dict[str, Any] = dataclasses.field(default_factory=dict)


def find_state(folder: FolderConfig, model: str) -> tuple[Path, dict[str, Any] | None, str | None]:
    """Finds the run folder, and in it the state to resume from.

    Args:
        folder: What is asked for.
        model: Name of the model, for a folder that is asked for by no name.

    Returns:
        The folder; the state, None for a new run; a line about it for the user, if there is one.

    Raises:
        UserError: There is no state to resume from, or it is not where the run is to be.
    """
    if folder.resume not in (None, "", "auto"):
        state = Path(folder.resume).expanduser()
        found = state if state.is_dir() else state.parent
        if state.exists() and (folder.output or folder.experiment):
            wanted = run_folder(folder.output, folder.experiment, model)
            if wanted.resolve() != found.resolve():
                raise UserError(
                    f"--resume {folder.resume} continues in {found}, not in {wanted}: "
                    "leave --output and --experiment out"
                )
        if not state.is_dir():
            return found, read_state(state), None
        newest, note = read_newest(state)
        return found, newest or read_state(state / STATE), note
    path = run_folder(folder.output, folder.experiment, model)
    if folder.resume != "auto":
        return path, None, None
    if not (folder.output or folder.experiment):
        raise UserError("--resume auto looks in the run folder: name it with --output")
    return path, *read_newest(path)


def check_same_run(saved: dict[str, Any], state: dict[str, Any], path: Path) -> None:
    """Refuses a state of another run.

    Args:
        saved: Flags of this run, as `saved_arguments` returns them.
        state: What the run folder holds.
        path: The run folder.

    Raises:
        UserError: A flag that makes it another run differs.
    """
    for key in FIXED_ON_RESUME:
        if saved[key] != state["args"][key]:
            raise UserError(
                f"cannot resume {path} with {key} {saved[key]}: it was started with "
                f"{state['args'][key]}; its flags are in --config {path / ARGUMENTS}"
            )


def check_same_place(processes: Processes, state: dict[str, Any] | None) -> None:
    """Checks that all processes found one state, which each has read by itself.

    Args:
        processes: Of the run; all make this call.
        state: What this one found, None for nothing.

    Raises:
        UserError: They did not: the folder is not the same for all.
    """
    if not processes.distributed:
        return
    place = None if state is None else (state["epoch"], state["batch"], state["updates"])
    places: list[Any] = [None] * processes.world_size
    distributed.all_gather_object(places, place)
    if len(set(places)) > 1:
        told = ", ".join(
            f"process {rank} {'none' if place is None else f'that of update {place[2]}'}"
            for rank, place in enumerate(places)
        )
        raise UserError(
            f"cannot resume: the processes found unlike states ({told}); the run folder has to be "
            "the same for all of them"
        )


def restore(run: Run, state: dict[str, Any]) -> Start:
    """Puts model, average, optimiser and scaler back to where ``state`` left them.

    The schedule follows from the number of updates, and everything random from the seed, which
    must be the same, and the place in the epoch. In another number of processes, or with another
    batch size, a run goes on from the last whole update before that place.
    """
    if state["num_classes"] != run.card.num_classes:
        raise UserError(
            f"cannot resume: the data has {run.card.num_classes} classes, "
            f"the run was started with {state['num_classes']}"
        )
    names = state.get("class_names")  # states of earlier versions have none
    check_same_classes(names, run.card.class_names, "the run to resume", "the data")
    try:
        load_full_state(run.task, run.updater.optimizer, state)
        if run.updater.scaler is not None and "scaler" in state:
            run.updater.scaler.load_state_dict(state["scaler"])
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        model = unwrap_model(run.task.get_eval_model())
        difference = misfit(model.state_dict(), state["state_dict"])
        if difference:
            raise UserError(
                f"cannot resume: the state is of {_named(state['args'])}, the command makes "
                f"{_named(saved_arguments(run.config))}: {difference}"
            ) from error
        reason = one_line(error)[:200]
        raise UserError(f"cannot resume: the state does not fit the model ({reason})") from error
    updater = run.updater
    start = Start(state["epoch"], state["batch"], lr=state["lr"], best=dict(state["best"]))
    updater.updates, updater.skipped = state["updates"], state["skipped"]
    per_batch = run.images_per_batch
    if (
        state["images_per_batch"] != per_batch
        or state["images"] != run.images  # of which an epoch has another number of updates
        or state["args"]["grad_accum_steps"] != updater.accumulate
    ):
        batch = start.batch * state["images_per_batch"] // per_batch
        start.batch = batch - batch % updater.accumulate
        updater.updates = start.epoch * run.updates_per_epoch + start.batch // updater.accumulate
    if start.batch and run.images != state["images"]:
        raise UserError(
            f"cannot resume in the middle of an epoch: the training set has {run.images} images, "
            f"the run was started with {state['images']}"
        )
    if start.batch and isinstance(run.train_loader.dataset, IterableImageDataset):
        args = state["args"]
        before = args["workers"], state["images_per_batch"] // args["batch_size"]
        if before != (run.config.data.workers, run.processes.data_size):
            run.notes.append(
                "warning: workers and processes share a stream of images, and their numbers have "
                "changed: the rest of this epoch repeats some images and leaves out others; with "
                f"{before[0]} workers in {before[1]} process(es) it would not"
            )
    start.progress = state["progress"] if start.batch else None
    return start


def _named(flags: Mapping[str, Any]) -> str:
    """Names a model, with the flags that its size depends on."""
    sizes = [f"--{key.replace('_', '-')} {flags[key]}" for key in SIZES if flags[key] is not None]
    return f"{flags['model']} ({' '.join(sizes) or 'default size'})"


def resume_note(run: Run, start: Start, saved: dict[str, Any], before: dict[str, Any]) -> str:
    """Says from where a run goes on, and under which other flags than before."""
    place = f"goes on after epoch {start.epoch}"
    if start.batch:
        place += f" and {start.batch} of {len(run.train_loader)} batches of the next"
    changed = [
        f"{key} {before[key]} -> {value}"
        for key, value in saved.items()
        if key in before and key not in LOCATION_KEYS and value != before[key]
    ]
    return f"{place}; changed: {', '.join(changed)}" if changed else place
