"""The ``train`` command: epochs, evaluation, files, resuming.

Files of a run. At each start: ``args.yaml``, which is a ``--config``; ``environment.json`` and,
where the code differs from its commit, ``git.patch``. Every log interval: ``updates.jsonl``. At the
end of each epoch: ``best.safetensors`` (the best held-out metric so far, of the model or of its
moving average), ``last.safetensors`` (the average where there is one), ``last_state.pt`` (what
resuming needs), ``summary.csv`` and ``metrics.jsonl`` (a row per epoch), ``curves.png``,
``bad_images.txt`` (if any were skipped). Trackers have a folder each.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from timm.scheduler.scheduler import Scheduler
from timm.utils import distribute_bn

from vitlinear.errors import UserError, one_line
from vitlinear.train import arguments, folder
from vitlinear.train.checkpoint import save_weights, write_text
from vitlinear.train.config import Parser, parse_with_config, saved_arguments
from vitlinear.train.curves import check_plotting, plot_curves
from vitlinear.train.environment import record_start
from vitlinear.train.evaluate import evaluate
from vitlinear.train.loader import start_epoch
from vitlinear.train.logger import FileLogger, Loggers
from vitlinear.train.loop import train_one_epoch
from vitlinear.train.parallel import (
    full_state,
    load_full_state,
    process_group,
    wait_for_all,
)
from vitlinear.train.progress import Progress
from vitlinear.train.setup import Run, set_up
from vitlinear.train.signals import Stopped, StopSignals
from vitlinear.train.state import read_newest, read_state, save_state
from vitlinear.train.trackers import check_trackers, make_trackers

# A resumed run that differs in one of these is another run.
FIXED_ON_RESUME = (
    "model", "model_kwargs", "model_ema", "seed", "opt",
    # what the optimiser's state holds would go over these
    "opt_eps", "opt_betas", "opt_kwargs", "momentum", "weight_decay", "weight_decay_1d",
    "layer_decay",
)  # fmt: skip
# A run does not become another by these.
LOCATION_KEYS = frozenset({"output", "experiment", "pin_mem"})


def make_parser(prog: str) -> Parser:
    """Returns a parser that knows every flag of training."""
    parser = Parser(prog=prog, description="Train a classifier; weights, metrics and curves.")
    arguments.add_data_arguments(parser)
    arguments.add_bad_images_argument(parser)
    arguments.add_model_arguments(parser, default="ravlt_t")
    arguments.add_input_arguments(parser)
    arguments.add_training_arguments(parser)
    arguments.add_device_arguments(parser)
    return parser


def parse_arguments(
    argv: Sequence[str] | None, prog: str = "vitlinear train"
) -> argparse.Namespace:
    """Parses flags over the ``--config`` file."""
    return parse_with_config(make_parser(prog), argv)


def main(argv: Sequence[str] | None, prog: str = "vitlinear train") -> None:
    """Runs the command; a run that a signal stopped ends the process with that signal's status."""
    args = parse_arguments(argv, prog)
    if args.print_config:
        print(yaml.safe_dump(saved_arguments(args), sort_keys=False), end="")
        return
    try:
        train(args)
    except Stopped as stop:
        if args.rank == 0:
            print(stop, flush=True)
        sys.exit(stop.exit_status)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Trains as ``args`` say.

    Args:
        args: From `parse_arguments`.

    Returns:
        ``folder``, ``epoch`` (number done), ``best`` (metric, value, epoch, weights).

    Raises:
        UserError: The request or the data cannot work; no file is left behind.
    """
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if args.plot:
        check_plotting()
    check_trackers(args.log_tensorboard, args.log_wandb)
    path, state, note = _find_state(args)
    saved = saved_arguments(args)  # before the launcher's ranks are added
    if state is not None:
        _check_same_run(saved, state, path)
    files = folder.RunFolder(path, resume=bool(args.resume), overwrite=args.overwrite)
    files.check()
    with process_group():
        run = set_up(args)
        start = Start() if state is None else _restore(run, state)
        if state is not None:
            run.notes.append(_resume_note(run, start, saved, state["args"]))
        with StopSignals() as signals:
            if args.rank != 0:
                return _epochs(run, None, start, saved, signals)
            with files:
                write_text(path / folder.ARGUMENTS, yaml.safe_dump(saved, sort_keys=False))
                record_start(path, run.device, run.updater.updates)
                for line in (*filter(None, [note]), *run.notes, f"files go to {path}"):
                    print(line)
                with Loggers(FileLogger(path), make_trackers(args, path, saved)) as log:
                    log.keep_before(start.epoch, run.updater.updates)
                    result = _epochs(run, path, start, saved, signals, log)
                print(_end_note(result))
                return result


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


def _find_state(args: argparse.Namespace) -> tuple[Path, dict[str, Any] | None, str | None]:
    """Returns the run folder, the state to resume from, if any, and a line about it, if any."""
    if args.resume not in (None, "", "auto"):
        state = Path(args.resume).expanduser()
        found = state if state.is_dir() else state.parent
        if state.exists() and (args.output or args.experiment):
            wanted = folder.run_folder(args.output, args.experiment, args.model)
            if wanted.resolve() != found.resolve():
                raise UserError(
                    f"--resume {args.resume} continues in {found}, not in {wanted}: "
                    "leave --output and --experiment out"
                )
        if not state.is_dir():
            return found, read_state(state), None
        newest, note = read_newest(state)
        return found, newest or read_state(state / folder.STATE), note
    path = folder.run_folder(args.output, args.experiment, args.model or "")
    if args.resume != "auto":
        return path, None, None
    if not (args.output or args.experiment):
        raise UserError("--resume auto looks in the run folder: name it with --output")
    return path, *read_newest(path)


def _check_same_run(saved: dict[str, Any], state: dict[str, Any], path: Path) -> None:
    for key in FIXED_ON_RESUME:
        if saved[key] != state["args"][key]:
            raise UserError(
                f"cannot resume {path} with {key} {saved[key]}: it was started with "
                f"{state['args'][key]}; its flags are in --config {path / folder.ARGUMENTS}"
            )


def _restore(run: Run, state: dict[str, Any]) -> Start:
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
    try:
        load_full_state(run.task, run.updater.optimizer, state)
        if run.updater.scaler is not None and "scaler" in state:
            run.updater.scaler.load_state_dict(state["scaler"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = one_line(error)[:200]
        raise UserError(f"cannot resume: the state does not fit the model ({reason})") from error
    args, updater = run.args, run.updater
    start = Start(state["epoch"], state["batch"], lr=state["lr"], best=dict(state["best"]))
    updater.updates, updater.skipped = state["updates"], state["skipped"]
    images = args.batch_size * args.world_size
    if (
        state["images_per_batch"] != images
        or state["args"]["grad_accum_steps"] != updater.accumulate
    ):
        batch = start.batch * state["images_per_batch"] // images
        start.batch = batch - batch % updater.accumulate
        updater.updates = start.epoch * run.updates_per_epoch + start.batch // updater.accumulate
    start.progress = state["progress"] if start.batch else None
    return start


def _resume_note(run: Run, start: Start, saved: dict[str, Any], before: dict[str, Any]) -> str:
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


def _end_note(result: dict[str, Any]) -> str:
    best = result["best"]
    return (
        f"ended after epoch {result['epoch']}; best held-out {best['metric']} "
        f"{best['value']:.4g} (epoch {best['epoch']}), in {result['folder'] / folder.BEST}"
    )


def _epochs(
    run: Run,
    path: Path | None,
    start: Start,
    saved: dict[str, Any],
    signals: StopSignals,
    log: Loggers | None = None,
) -> dict[str, Any]:
    """Runs the remaining epochs; ``path`` and ``log`` are None in processes that write nothing."""
    args, updater = run.args, run.updater
    best = start.best
    end = min(run.epochs, args.stop_epoch or run.epochs)
    if updater.scheduler is not None:
        set_schedule(updater.scheduler, start.epoch, updater.updates)
    for epoch in range(start.epoch, end):
        at = start if epoch == start.epoch else Start(epoch, best=best)
        if at.lr is None:
            at.lr = updater.lr

        def after_update(
            progress: Progress, values: dict[str, float] | None, at: Start = at
        ) -> None:
            if log and values:
                log.log_update(updater.updates, values)
            number = signals.agreed(run.device, updater.updates)
            due = args.recovery_interval and updater.updates % args.recovery_interval == 0
            if number or due:
                here = dataclasses.replace(at, batch=progress.done, progress=progress.state())
                run.bad_images.report(path)
                _write_state(run, path, saved, here, full_state(run.task, updater.optimizer))
            if number:
                wait_for_all()  # or the end of one would have its launcher kill the one that saves
                where = f"update {updater.updates}, in epoch {at.epoch + 1}"
                raise Stopped(number, where, path)

        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            run.train_loader.mixup_enabled = False
        start_epoch(run.train_loader, args.seed, epoch, args.rank, at.batch)
        progress = Progress(
            len(run.train_loader),
            epoch=epoch + 1,
            epochs=end,
            done=at.batch,
            state=at.progress,
            device=run.device,
            log_interval=args.log_interval,
            show=path is not None,
            epoch_seconds=log.rows[-1]["seconds"] if log and log.rows else None,
        )
        trained = train_one_epoch(
            updater,
            run.train_loader,
            run.autocast,
            progress,
            seed=args.seed,
            epoch=epoch,
            rank=args.rank,
            after_update=after_update,
            max_nonfinite=args.max_nonfinite,
            channels_last=args.channels_last,
        )
        row: dict[str, Any] = {"epoch": epoch + 1, "updates": updater.updates, "lr": at.lr}
        row |= trained
        began = time.perf_counter()
        for name, metrics in _evaluate_all(run).items():
            row |= {f"{name}_{key}": value for key, value in metrics.items()}
        row |= run.bad_images.report(path)
        row["seconds"] += time.perf_counter() - began
        if updater.scheduler is not None:
            updater.scheduler.step(epoch + 1)
        found = _best_of(row, args.eval_metric)
        improved = not best or _better(found["value"], best["value"], args.eval_metric)
        if improved:
            best = found
        whole = full_state(run.task, updater.optimizer)
        if path and log:
            _write_epoch(run, path, log, row, best, improved, whole)
        _write_state(run, path, saved, Start(epoch + 1, best=best), whole)
        if path and log:
            _show_epoch(run, path, log, improved)
        number = signals.agreed(run.device)
        if number and epoch + 1 < end:
            wait_for_all()
            raise Stopped(number, f"epoch {epoch + 1}", path)
    return {"folder": path, "epoch": max(start.epoch, end), "best": best}


def set_schedule(scheduler: Scheduler, epoch: int, updates: int) -> None:
    """Sets the learning rate of a position; only the call that matches its unit acts."""
    scheduler.step(epoch)
    scheduler.step_update(updates)


def _evaluate_all(run: Run) -> dict[str, dict[str, float]]:
    """Evaluates the model and, where there is one, its moving average."""
    args, results = run.args, {}
    if args.distributed and args.dist_bn:
        for ema in (False, True) if run.updater.ema else (False,):
            model = run.task.get_eval_model(ema=ema)
            distribute_bn(model, args.world_size, args.dist_bn == "reduce")
    for name, ema in (("eval", False), ("ema", True)):
        if ema and not run.updater.ema:
            continue
        model = run.task.get_eval_model(ema=ema)
        assert model is not None
        results[name] = evaluate(
            model,
            run.eval_loader,
            run.autocast,
            device=run.device,
            title=name,
            channels_last=args.channels_last,
            distributed=args.distributed,
            show_progress=args.rank == 0,
        )
    return results


def _better(value: float, than: float, metric: str) -> bool:
    return value < than if metric == "loss" else value > than


def _best_of(row: dict[str, Any], metric: str) -> dict[str, Any]:
    """Returns the better of the model and its average in one epoch; a tie goes to the average."""
    best = {"metric": metric, "epoch": row["epoch"], "weights": "model"}
    best["value"] = row[f"eval_{metric}"]
    average = row.get(f"ema_{metric}", math.nan)
    if average == best["value"] or _better(average, best["value"], metric):
        best |= {"value": average, "weights": "ema"}
    return best


def _write_epoch(
    run: Run,
    path: Path,
    log: Loggers,
    row: dict[str, Any],
    best: dict[str, Any],
    improved: bool,
    whole: dict[str, Any],
) -> None:
    """Writes weights and metrics of an epoch; the state comes after what it speaks of."""
    last = "ema" if run.updater.ema else "model"
    kinds = [(folder.LAST, last)] + ([(folder.BEST, best["weights"])] if improved else [])
    for name, kind in kinds:
        ema = kind == "ema"
        prefix, key = ("ema", "state_dict_ema") if ema else ("eval", "state_dict")
        metric = {run.args.eval_metric: row[f"{prefix}_{run.args.eval_metric}"]}
        card = dataclasses.replace(run.card, epoch=row["epoch"], metric=metric, weights=kind)
        save_weights(path / name, whole[key], card)
    log.log_epoch(row)


def _write_state(
    run: Run, path: Path | None, saved: dict[str, Any], at: Start, whole: dict[str, Any]
) -> None:
    """Writes the state, with what `full_state` returned, in the process that has a path."""
    if path is None:
        return
    updater, args = run.updater, run.args
    state = {
        **whole,
        "epoch": at.epoch,
        "batch": at.batch,
        "progress": at.progress,
        "lr": at.lr,
        "updates": updater.updates,
        "skipped": updater.skipped,
        "images_per_batch": args.batch_size * args.world_size,
        "num_classes": run.card.num_classes,
        "best": at.best,
        "args": saved,
    }
    if updater.scaler is not None:
        state["scaler"] = updater.scaler.state_dict()
    save_state(path / folder.STATE, state)


def _show_epoch(run: Run, path: Path, log: Loggers, improved: bool) -> None:
    row = log.rows[-1]
    if run.args.plot:
        plot_curves(log.rows, path / folder.CURVES)
    shown = f", average {row['ema_top1']:.2f} %" if "ema_top1" in row else ""
    shown += f", {row['bad_images']} unreadable images left out" if "bad_images" in row else ""
    print(
        f"epoch {row['epoch']}: loss {row['train_loss']:.4f}, held-out top-1 "
        f"{row['eval_top1']:.2f} %{shown}, {row['images_per_s']:.0f} images/s, "
        f"{row['seconds']:.1f} s{' (best so far)' if improved else ''}",
        flush=True,
    )
