"""The epochs of a run: each is trained, evaluated and recorded."""

import dataclasses
import math
import time
from typing import Any

from timm.data import IterableImageDataset
from timm.utils import distribute_bn, unwrap_model
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from vitlinear.data.loader import start_epoch
from vitlinear.evaluation.evaluate import evaluate
from vitlinear.layers.moved_buffers import moved_buffers
from vitlinear.signals import Stopped, StopSignals

from .loop import train_one_epoch
from .parallel import in_step, wait_for_all
from .progress import Progress
from .recorder import Recorder
from .resume import Start
from .schedule import set_schedule
from .setup import Run


def run_epochs(run: Run, recorder: Recorder, start: Start, signals: StopSignals) -> dict[str, Any]:
    """Runs the remaining epochs.

    Args:
        run: Everything that trains.
        recorder: Takes what the run leaves.
        start: Where to begin.
        signals: Asked after each update.

    Returns:
        ``folder``, ``epoch`` (number done), ``best`` (metric, value, epoch, weights).

    Raises:
        Stopped: A signal asked for it; the state is written.
    """
    updater, scheduler = run.updater, run.updater.scheduler
    best, metric = start.best, run.config.run.eval_metric
    end = min(run.epochs, run.config.schedule.stop_epoch or run.epochs)
    if scheduler is not None:
        set_schedule(scheduler, start.epoch, updater.updates)
    for epoch in range(start.epoch, end):
        at = start if epoch == start.epoch else Start(epoch, best=best)
        if at.lr is None:
            at.lr = updater.lr
        row = _train(run, recorder, signals, at, end)
        began = time.perf_counter()
        for name, metrics in _evaluate_all(run).items():
            row |= {f"{name}_{key}": value for key, value in metrics.items()}
        row |= run.bad_images.report(recorder.path)
        row["seconds"] += time.perf_counter() - began
        if scheduler is not None:
            scheduler.step(epoch + 1)
        found = _best_of(row, metric)
        improved = not best or _better(found["value"], best["value"], metric)
        if improved:
            best = found
        recorder.write_epoch(row, best, improved)
        number = signals.agreed(run.device)
        if number and epoch + 1 < end:
            wait_for_all()
            raise Stopped(number, f"epoch {epoch + 1}", recorder.path)
    return {"folder": recorder.path, "epoch": max(start.epoch, end), "best": best}


def _train(
    run: Run, recorder: Recorder, signals: StopSignals, at: Start, end: int
) -> dict[str, Any]:
    """Trains one epoch, of ``end``, from the batch on that ``at`` says; returns its row.

    The state at its end is written: an evaluation may take longer than a queue waits for its end.
    """
    config, updater, processes = run.config, run.updater, run.processes
    rank = processes.data_rank
    off_epoch, recovery = config.augmentation.mixup_off_epoch, config.run.recovery_interval

    def save() -> None:
        here = dataclasses.replace(at, batch=progress.done, progress=progress.state())
        recorder.write_state(here)

    def after_update(progress: Progress, values: dict[str, float] | None) -> None:
        if progress.done == progress.total:
            # before any state of the epoch's end, or a resume would go on with those of one process
            _distribute_statistics(run)
        if values:
            recorder.log_update(values)
        number = signals.agreed(run.device, updater.updates)
        due = recovery and updater.updates % recovery == 0
        if number or due:
            save()
        if number:
            wait_for_all()  # or the end of one would have its launcher kill the one that saves
            where = f"update {updater.updates}, in epoch {at.epoch + 1}"
            raise Stopped(number, where, recorder.path)

    if off_epoch and at.epoch >= off_epoch:
        run.train_loader.mixup_enabled = False
    start_epoch(run.train_loader, config.run.seed, at.epoch, rank, at.batch)
    progress = Progress(
        len(run.train_loader),
        epoch=at.epoch + 1,
        epochs=end,
        done=at.batch,
        state=at.progress,
        device=run.device,
        log_interval=config.record.log_interval,
        show=recorder.path is not None,
        counts=processes.row == 0,
        epoch_seconds=recorder.epoch_seconds,
    )
    trained = train_one_epoch(
        updater,
        run.train_loader,
        run.autocast,
        progress,
        seed=config.run.seed,
        epoch=at.epoch,
        rank=rank,
        row=processes.row,
        after_update=after_update,
        share=run.share,
        max_nonfinite=config.run.max_nonfinite,
        channels_last=config.device.channels_last,
    )
    save()
    return {"epoch": at.epoch + 1, "updates": updater.updates, "lr": at.lr, **trained}


def _distribute_statistics(run: Run) -> None:
    """Gives all processes the same batch norm statistics and centroids, as ``--dist-bn`` says."""
    processes, dist_bn = run.processes, run.config.parallel.dist_bn
    if processes.distributed and dist_bn:
        for ema in (False, True) if run.updater.ema else (False,):
            model = run.task.get_eval_model(ema=ema)
            # Of the average a state holds the statistics of the first process alone.
            reduce = dist_bn == "reduce" and not ema
            distribute_bn(model, processes.world_size, reduce)
            for module in unwrap_model(model).modules():
                for _, moved in moved_buffers(module):
                    if reduce:
                        distributed.all_reduce(moved)
                        moved /= processes.world_size
                    else:
                        distributed.broadcast(moved, 0)


def _evaluate_all(run: Run) -> dict[str, dict[str, float]]:
    """Evaluates the model and, where there is one, its moving average."""
    processes, results = run.processes, {}
    for name, ema in (("eval", False), ("ema", True)):
        if ema and not run.updater.ema:
            continue
        model = run.task.get_eval_model(ema=ema)
        assert model is not None
        if isinstance(model, DistributedDataParallel):
            # Which would exchange statistics at each batch, and processes may have unlike numbers.
            model = model.module
        batches = run.eval_loader
        if run.config.parallel.fsdp and isinstance(batches.dataset, IterableImageDataset):
            batches = in_step(batches, run.card.data_config.input_size, run.device)
        results[name] = evaluate(
            model,
            batches,
            run.autocast,
            device=run.device,
            title=name,
            share=run.share,
            channels_last=run.config.device.channels_last,
            distributed=processes.distributed,
            show_progress=processes.rank == 0,
        )
    return results


def _better(value: float, than: float, metric: str) -> bool:
    if math.isnan(value) or math.isnan(than):  # what is not a number is worse than any
        return not math.isnan(value)
    return value < than if metric == "loss" else value > than


def _best_of(row: dict[str, Any], metric: str) -> dict[str, Any]:
    """Returns the better of the model and its average in one epoch; a tie goes to the average."""
    best = {"metric": metric, "epoch": row["epoch"], "weights": "model"}
    best["value"] = row[f"eval_{metric}"]
    average = row.get(f"ema_{metric}", math.nan)
    if average == best["value"] or _better(average, best["value"], metric):
        best |= {"value": average, "weights": "ema"}
    return best
