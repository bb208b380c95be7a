"""The numbers of a run: one row per epoch as CSV and JSON lines, and their curves as a PNG."""

import csv
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

from vitlinear.errors import UserError
from vitlinear.train.checkpoint import write_atomically, write_text


def check_plotting() -> None:
    """Raises `UserError` if the curves could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "curves.png needs matplotlib: pip install 'vitlinear[train]', or add --no-plot"
        )


class MetricsLog:
    """Rows of ``summary.csv`` and ``metrics.jsonl``.

    Both are rewritten whole at each epoch: they stay small, and a run that was killed and resumed
    leaves neither a half row nor an epoch twice.
    """

    def __init__(self, folder: Path) -> None:
        self.csv, self.jsonl = folder / "summary.csv", folder / "metrics.jsonl"
        self.rows: list[dict[str, Any]] = []

    def keep_before(self, epoch: int) -> None:
        """Takes over the rows of an earlier run up to the epoch at which it resumes."""
        if not self.jsonl.is_file():
            return
        try:
            rows = [json.loads(line) for line in self.jsonl.read_text("utf-8").splitlines()]
            self.rows = [row for row in rows if row["epoch"] <= epoch]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.jsonl} is damaged ({error}); move it away") from error

    def add(self, row: dict[str, Any]) -> None:
        """Adds an epoch's row and writes both files."""
        self.rows.append(row)
        write_text(self.jsonl, "".join(json.dumps(row) + "\n" for row in self.rows))
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.csv, text.getvalue())


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws loss, top-1 and learning rate against the epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = (
        ("loss", ("train_loss", "eval_loss", "ema_loss")),
        ("top-1 (%)", ("train_top1", "eval_top1", "ema_top1")),
        ("learning rate", ("lr",)),
    )
    for axes, (label, names) in zip(figure.subplots(1, 3), panels, strict=True):
        for name in names:
            points = [(row["epoch"], row[name]) for row in rows if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker=".")
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))
