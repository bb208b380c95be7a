"""The curves of a run as a PNG."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitlinear.errors import UserError, pip_install
from vitlinear.files import write_atomically

PANELS = (
    ("loss", ("train_loss", "eval_loss", "ema_loss")),
    ("top-1 (%)", ("train_top1", "eval_top1", "ema_top1")),
    ("learning rate", ("lr",)),
    ("images/s", ("images_per_s",)),
)


def check_plotting(what: str = "curves.png", instead: str = ", or add --no-plot") -> None:
    """Raises `UserError` if ``what`` could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{what} needs matplotlib: {pip_install('train')}{instead}")


def plot_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws loss, top-1, learning rate and speed against the epoch; writes the file atomically.

    Args:
        rows: One per epoch, as the loggers get them; of names that a row lacks, nothing is drawn.
        path: The PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    for axes, (label, names) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for name in names:
            points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=name, marker="." if len(rows) < 50 else ""
                )
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if len(names) > 1 and axes.lines:
            axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))
