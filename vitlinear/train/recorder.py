"""The files of a run that change while it goes on: weights, state, rows and curves."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitlinear.checkpoints.card import save_weights

from .parallel import full_state
from .record.curves import plot_curves
from .record.folder import BEST, CURVES, LAST, STATE
from .record.logger import Loggers
from .record.saved_state import save_state
from .resume import Start
from .setup import Run


class Recorder:
    """Writes the files of a run while it goes on.

    All processes make the same calls: tensors of a split model are put together. One of them
    writes.

    Args:
        run: Everything that trains.
        saved: Flags, for the state.
        path: The run folder; None in processes that write nothing.
        log: Takes the rows; None where ``path`` is.
    """

    def __init__(
        self,
        run: Run,
        saved: dict[str, Any],
        path: Path | None = None,
        log: Loggers | None = None,
    ) -> None:
        self.run, self.saved, self.path, self.log = run, saved, path, log

    @property
    def epoch_seconds(self) -> float | None:
        """Seconds of the last epoch with its evaluation, where that is known."""
        return self.log.rows[-1]["seconds"] if self.log and self.log.rows else None

    def log_update(self, values: Mapping[str, Any]) -> None:
        """Logs the numbers of an interval that ends with the update just made."""
        if self.log:
            self.log.log_update(self.run.updater.updates, values)

    def write_state(self, at: Start) -> None:
        """Writes the state in the middle of an epoch, or before its evaluation.

        Args:
            at: Where the run goes on from it.
        """
        self.run.bad_images.report(self.path)
        self._save(at, full_state(self.run.task, self.run.updater.optimizer))

    def write_epoch(self, row: dict[str, Any], best: dict[str, Any], improved: bool) -> None:
        """Writes everything that an epoch leaves; the state comes after what it speaks of.

        Args:
            row: Numbers of the epoch.
            best: Metric, value, epoch and weights of the best epoch so far.
            improved: Whether that is this one.
        """
        whole = full_state(self.run.task, self.run.updater.optimizer)
        if self.path and self.log:
            self._save_weights(self.path, row, best, improved, whole)
            self.log.log_epoch(row)
        self._save(Start(row["epoch"], best=best), whole)
        if self.path and self.log:
            if self.run.config.record.plot:
                plot_curves(self.log.rows, self.path / CURVES)
            _print_epoch(self.log.rows[-1], improved)

    def _save_weights(
        self,
        path: Path,
        row: dict[str, Any],
        best: dict[str, Any],
        improved: bool,
        whole: dict[str, Any],
    ) -> None:
        name = self.run.config.run.eval_metric
        last = "ema" if self.run.updater.ema else "model"
        kinds = [(LAST, last)] + ([(BEST, best["weights"])] if improved else [])
        for file, kind in kinds:
            ema = kind == "ema"
            prefix, key = ("ema", "state_dict_ema") if ema else ("eval", "state_dict")
            card = dataclasses.replace(
                self.run.card,
                epoch=row["epoch"],
                metric={name: row[f"{prefix}_{name}"]},
                weights=kind,
            )
            save_weights(path / file, whole[key], card)

    def _save(self, at: Start, whole: dict[str, Any]) -> None:
        """Writes the state, with what `full_state` returned, in the process that has a path."""
        if self.path is None:
            return
        run, updater = self.run, self.run.updater
        state = {
            **whole,
            "epoch": at.epoch,
            "batch": at.batch,
            "progress": at.progress,
            "lr": at.lr,
            "updates": updater.updates,
            "skipped": updater.skipped,
            "images_per_batch": run.images_per_batch,
            "images": run.images,
            "num_classes": run.card.num_classes,
            "class_names": run.card.class_names,
            "best": at.best,
            "args": self.saved,
        }
        if updater.scaler is not None:
            state["scaler"] = updater.scaler.state_dict()
        save_state(self.path / STATE, state)


def _print_epoch(row: Mapping[str, Any], improved: bool) -> None:
    shown = f", average {row['ema_top1']:.2f} %" if "ema_top1" in row else ""
    shown += f", {row['bad_images']} unreadable images left out" if "bad_images" in row else ""
    print(
        f"epoch {row['epoch']}: loss {row['train_loss']:.4f}, held-out top-1 "
        f"{row['eval_top1']:.2f} %{shown}, {row['images_per_s']:.0f} images/s, "
        f"{row['seconds']:.1f} s{' (best so far)' if improved else ''}",
        flush=True,
    )
