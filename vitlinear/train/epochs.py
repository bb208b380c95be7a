"""The epochs of a run: each is trained, evaluated, and leaves its files."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

from timm.utils import distribute_bn

from vitlinear.checkpoints.card import save_weights
from vitlinear.data.loader import start_epoch
from vitlinear.evaluation.evaluate import evaluate
from vitlinear.signals import Stopped, StopSignals

from .loop import train_one_epoch
from .parallel import full_state, wait_for_all
from .progress import Progress
from .record.curves import plot_curves
from .record.folder import BEST, CURVES, LAST, STATE
from .record.logger import Loggers
from .record.state import save_state
from .resume import Start
from .schedule import set_schedule
from .setup import Run


def run_epochs(
    run: Run,
    path: Path | None,
    start: Start,
    saved: dict[str, Any],
    signals: StopSignals,
    log: Loggers | None = None,
) -> dict[str, Any]:
    """Runs the remaining epochs.

    Args:
        run: Everything that trains.
        path: The run folder; None in processes that write nothing.
        start: Where to begin.
        saved: Flags, for the state.
        signals: Asked after each update.
        log: Takes the rows; None where ``path`` is.

    Returns:
        ``folder``, ``epoch`` (number done), ``best`` (metric, value, epoch, weights).

    Raises:
        Stopped: A signal asked for it; the state is written.
    """
    config, updater = run.config, run.updater
    best, metric, seed = start.best, config.run.eval_metric, config.run.seed
    end = min(run.epochs, config.schedule.stop_epoch or run.epochs)
    off_epoch, recovery = config.augmentation.mixup_off_epoch, config.run.recovery_interval
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
            due = recovery and updater.updates % recovery == 0
            if number or due:
                here = dataclasses.replace(at, batch=progress.done, progress=progress.state())
                run.bad_images.report(path)
                _write_state(run, path, saved, here, full_state(run.task, updater.optimizer))
            if number:
                wait_for_all()  # or the end of one would have its launcher kill the one that saves
                where = f"update {updater.updates}, in epoch {at.epoch + 1}"
                raise Stopped(number, where, path)

        if off_epoch and epoch >= off_epoch:
            run.train_loader.mixup_enabled = False
        start_epoch(run.train_loader, seed, epoch, run.processes.rank, at.batch)
        progress = Progress(
            len(run.train_loader),
            epoch=epoch + 1,
            epochs=end,
            done=at.batch,
            state=at.progress,
            device=run.device,
            log_interval=config.record.log_interval,
            show=path is not None,
            epoch_seconds=log.rows[-1]["seconds"] if log and log.rows else None,
        )
        trained = train_one_epoch(
            updater,
            run.train_loader,
            run.autocast,
            progress,
            seed=seed,
            epoch=epoch,
            rank=run.processes.rank,
            after_update=after_update,
            max_nonfinite=config.run.max_nonfinite,
            channels_last=config.device.channels_last,
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
        found = _best_of(row, metric)
        improved = not best or _better(found["value"], best["value"], metric)
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


def _evaluate_all(run: Run) -> dict[str, dict[str, float]]:
    """Evaluates the model and, where there is one, its moving average."""
    processes, dist_bn = run.processes, run.config.parallel.dist_bn
    results = {}
    if processes.distributed and dist_bn:
        for ema in (False, True) if run.updater.ema else (False,):
            model = run.task.get_eval_model(ema=ema)
            distribute_bn(model, processes.world_size, dist_bn == "reduce")
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
            channels_last=run.config.device.channels_last,
            distributed=processes.distributed,
            show_progress=processes.rank == 0,
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
    kinds = [(LAST, last)] + ([(BEST, best["weights"])] if improved else [])
    for name, kind in kinds:
        ema = kind == "ema"
        prefix, key = ("ema", "state_dict_ema") if ema else ("eval", "state_dict")
        name_of_metric = run.config.run.eval_metric
        metric = {name_of_metric: row[f"{prefix}_{name_of_metric}"]}
        card = dataclasses.replace(run.card, epoch=row["epoch"], metric=metric, weights=kind)
        save_weights(path / name, whole[key], card)
    log.log_epoch(row)


def _write_state(
    run: Run, path: Path | None, saved: dict[str, Any], at: Start, whole: dict[str, Any]
) -> None:
    """Writes the state, with what `full_state` returned, in the process that has a path."""
    if path is None:
        return
    updater = run.updater
    state = {
        **whole,
        "epoch": at.epoch,
        "batch": at.batch,
        "progress": at.progress,
        "lr": at.lr,
        "updates": updater.updates,
        "skipped": updater.skipped,
        "images_per_batch": run.images_per_batch,
        "images": len(run.train_loader.dataset),
        "num_classes": run.card.num_classes,
        "best": at.best,
        "args": saved,
    }
    if updater.scaler is not None:
        state["scaler"] = updater.scaler.state_dict()
    save_state(path / STATE, state)


def _show_epoch(run: Run, path: Path, log: Loggers, improved: bool) -> None:
    row = log.rows[-1]
    if run.config.record.plot:
        plot_curves(log.rows, path / CURVES)
    shown = f", average {row['ema_top1']:.2f} %" if "ema_top1" in row else ""
    shown += f", {row['bad_images']} unreadable images left out" if "bad_images" in row else ""
    print(
        f"epoch {row['epoch']}: loss {row['train_loss']:.4f}, held-out top-1 "
        f"{row['eval_top1']:.2f} %{shown}, {row['images_per_s']:.0f} images/s, "
        f"{row['seconds']:.1f} s{' (best so far)' if improved else ''}",
        flush=True,
    )
