"""The ``train`` command: epochs, evaluation, files, resuming.

Files of a run, written at the end of each epoch: ``best.safetensors`` (the best held-out metric so
far, of the model or of its moving average), ``last.safetensors`` (the average where there is one),
``last_state.pt`` (what resuming needs), ``summary.csv`` and ``metrics.jsonl`` (a row per epoch),
``curves.png``; and at the start ``args.yaml``, which is a ``--config``.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.scheduler.scheduler import Scheduler
from timm.utils import distribute_bn
from torch import distributed

from vitlinear.errors import UserError, one_line
from vitlinear.train import arguments, folder
from vitlinear.train.checkpoint import read_state, save_state, save_weights, write_text
from vitlinear.train.config import Parser, parse_with_config, saved_arguments
from vitlinear.train.evaluate import evaluate
from vitlinear.train.loader import start_epoch
from vitlinear.train.logger import MetricsLog, check_plotting, plot_curves
from vitlinear.train.loop import train_one_epoch
from vitlinear.train.setup import Run, set_up

# A resumed run that differs in one of these is another run.
FIXED_ON_RESUME = ("model", "model_kwargs", "opt", "model_ema", "seed")


def parse_arguments(
    argv: Sequence[str] | None, prog: str = "vitlinear train"
) -> argparse.Namespace:
    """Parses flags over the ``--config`` file."""
    parser = Parser(prog=prog, description="Train a classifier; weights, metrics and curves.")
    arguments.add_data_arguments(parser)
    arguments.add_model_arguments(parser, default="ravlt_t")
    arguments.add_input_arguments(parser)
    arguments.add_training_arguments(parser)
    arguments.add_device_arguments(parser)
    return parse_with_config(parser, argv)


def main(argv: Sequence[str] | None, prog: str = "vitlinear train") -> None:
    """Runs the command."""
    train(parse_arguments(argv, prog))


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
    path, state_path = _where(args)
    state = read_state(state_path) if state_path else None
    saved = saved_arguments(args)  # before the launcher's ranks are added
    if state is not None:
        _check_same_run(saved, state, state_path)
    files = folder.RunFolder(path, resume=bool(args.resume), overwrite=args.overwrite)
    files.check()
    try:
        run = set_up(args)
        if state is not None:
            _restore(run, state)
        if args.rank != 0:
            return _epochs(run, None, state, saved)
        with files:
            write_text(path / folder.ARGUMENTS, yaml.safe_dump(saved, sort_keys=False))
            for note in (*run.notes, f"files go to {path}"):
                print(note)
            return _epochs(run, path, state, saved)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _where(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """Returns the run folder and the state to resume from, if any."""
    if args.resume not in (None, "", "auto"):
        state = Path(args.resume).expanduser()
        state = state / folder.STATE if state.is_dir() else state
        if state.is_file() and (args.output or args.experiment):
            wanted = folder.run_folder(args.output, args.experiment, args.model)
            if wanted.resolve() != state.parent.resolve():
                raise UserError(
                    f"--resume {args.resume} continues in {state.parent}, not in {wanted}: "
                    "leave --output and --experiment out"
                )
        return state.parent, state
    path = folder.run_folder(args.output, args.experiment, args.model or "")
    if args.resume == "auto":
        if not (args.output or args.experiment):
            raise UserError("--resume auto looks in the run folder: name it with --output")
        state = path / folder.STATE
        return path, state if state.is_file() else None
    return path, None


def _check_same_run(saved: dict[str, Any], state: dict[str, Any], path: Path | None) -> None:
    for key in FIXED_ON_RESUME:
        if saved[key] != state["args"][key]:
            raise UserError(
                f"cannot resume {path} with {key} {saved[key]}: it was started with "
                f"{state['args'][key]}"
            )


def _restore(run: Run, state: dict[str, Any]) -> None:
    """Puts model, average, optimiser, scaler and schedule back to where ``state`` left them.

    Random state needs no restoring: each epoch's follows from the seed, which must be the same.
    """
    if state["num_classes"] != run.card.num_classes:
        raise UserError(
            f"cannot resume: the data has {run.card.num_classes} classes, "
            f"the run was started with {state['num_classes']}"
        )
    try:
        run.task.load_checkpoint_state(state["state_dict"])
        if run.updater.ema:
            run.task.load_checkpoint_state(state["state_dict_ema"], ema=True)
        run.updater.optimizer.load_state_dict(state["optimizer"])
        if run.updater.scaler is not None and "scaler" in state:
            run.updater.scaler.load_state_dict(state["scaler"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = one_line(error)[:200]
        raise UserError(f"cannot resume: the state does not fit the model ({reason})") from error
    run.updater.updates = state["updates"]


def _epochs(
    run: Run, path: Path | None, state: dict[str, Any] | None, saved: dict[str, Any]
) -> dict[str, Any]:
    """Runs the remaining epochs; ``path`` is None in processes that write nothing."""
    args, updater = run.args, run.updater
    first = state["epoch"] if state else 0
    best: dict[str, Any] = dict(state["best"]) if state else {}
    log = MetricsLog(path) if path else None
    if log and state:
        log.keep_before(first)
    end = min(run.epochs, args.stop_epoch or run.epochs)
    if updater.scheduler is not None:
        set_schedule(updater.scheduler, first, first * run.updates_per_epoch)
    for epoch in range(first, end):
        start = time.perf_counter()
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            run.train_loader.mixup_enabled = False
        start_epoch(run.train_loader, args.seed, epoch, args.rank)
        lr = updater.optimizer.param_groups[0]["lr"]
        trained = train_one_epoch(
            updater,
            run.train_loader,
            run.autocast,
            title=f"epoch {epoch + 1}/{end}",
            channels_last=args.channels_last,
            log_interval=args.log_interval,
            show_progress=path is not None,
        )
        row: dict[str, Any] = {"epoch": epoch + 1, "lr": lr}
        row |= {f"train_{name}": trained[name] for name in ("loss", "top1")}
        for name, metrics in _evaluate_all(run).items():
            row |= {f"{name}_{key}": value for key, value in metrics.items()}
        row["images_per_s"] = trained["images_per_s"] * args.world_size
        row["seconds"] = time.perf_counter() - start
        if run.device.type == "cuda":
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated(run.device) / 2**30
        if updater.scheduler is not None:
            updater.scheduler.step(epoch + 1)
        found = _best_of(row, args.eval_metric)
        improved = not best or _better(found["value"], best["value"], args.eval_metric)
        if improved:
            best = found
        if path and log:
            _write_epoch(run, path, log, row, best, improved, saved)
    return {"folder": path, "epoch": max(first, end), "best": best}


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
    log: MetricsLog,
    row: dict[str, Any],
    best: dict[str, Any],
    improved: bool,
    saved: dict[str, Any],
) -> None:
    """Writes the files of one epoch; the state last, so that it never names what is not there."""
    weights = dict(run.task.get_checkpoint_state())
    if run.updater.ema:
        weights |= run.task.get_checkpoint_state(ema=True)
    names = {"model": "state_dict", "ema": "state_dict_ema"}
    last = "ema" if run.updater.ema else "model"
    kinds = [(folder.LAST, last)] + ([(folder.BEST, best["weights"])] if improved else [])
    for name, kind in kinds:
        prefix = "ema" if kind == "ema" else "eval"
        metric = {run.args.eval_metric: row[f"{prefix}_{run.args.eval_metric}"]}
        card = dataclasses.replace(run.card, epoch=row["epoch"], metric=metric, weights=kind)
        save_weights(path / name, weights[names[kind]], card)
    log.add(row)
    state = {
        **weights,
        "epoch": row["epoch"],
        "updates": run.updater.updates,
        "num_classes": run.card.num_classes,
        "optimizer": run.updater.optimizer.state_dict(),
        "best": best,
        "args": saved,
    }
    if run.updater.scaler is not None:
        state["scaler"] = run.updater.scaler.state_dict()
    save_state(path / folder.STATE, state)
    if run.args.plot:
        plot_curves(log.rows, path / folder.CURVES)
    shown = f", average {row['ema_top1']:.2f} %" if "ema_top1" in row else ""
    print(
        f"epoch {row['epoch']}: loss {row['train_loss']:.4f}, held-out top-1 "
        f"{row['eval_top1']:.2f} %{shown}, {row['images_per_s']:.0f} images/s, "
        f"{row['seconds']:.1f} s{' (best so far)' if improved else ''}",
        flush=True,
    )
