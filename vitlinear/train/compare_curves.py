"""Curves of runs beside each other: means over groups of them, drawn in one figure."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitlinear.errors import UserError
from vitlinear.files import write_atomically

from .record.recorded import Recorded


@dataclass
class Curve:
    """A line of a plot, of one run or a group: x, mean, standard deviation (0 of one run)."""

    label: str
    x: list[float] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    runs: int = 1


def curves(groups: Mapping[str, Sequence[Recorded]], metric: str, x: str) -> list[Curve]:
    """Returns a curve per group: mean and spread at each x that all of its runs have.

    Against seconds, which no two runs share, runs of a group are averaged by epoch.

    Raises:
        UserError: The runs of a group have no x in common.
    """
    found = []
    for label, members in groups.items():
        lines = [run.points(metric, x) for run in members]
        if x == "seconds":
            steps: list[list[tuple[float, float]]] = [list(s) for s in zip(*lines, strict=False)]
        else:
            by_x = [dict(line) for line in lines]
            common = sorted(set.intersection(*(set(values) for values in by_x)))
            steps = [[(at, values[at]) for values in by_x] for at in common]
        if not steps:
            raise UserError(
                f"the runs of {label} have no {x} in common at which they tell {metric}: "
                "try --x epoch"
            )
        curve = Curve(label, runs=len(members))
        for step in steps:
            mean, spread = mean_and_spread([value for _, value in step])
            curve.x.append(statistics.fmean(at for at, _ in step))
            curve.mean.append(mean)
            curve.spread.append(spread)
        found.append(curve)
    return found


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and the sample standard deviation, which is 0 of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def check_format(path: Path) -> None:
    """Raises `UserError` if nothing can be drawn in the format that a file's name asks for."""
    from matplotlib.backend_bases import FigureCanvasBase

    if path.suffix[1:] not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f"--output {path}: the name must end in .png, .pdf or .svg")


def plot(panels: Mapping[str, Sequence[Curve]], x: str, path: Path) -> None:
    """Draws a panel per metric, atomically written in the format of the file's suffix."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 3.8 * lines), layout="constrained")
    cells = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (metric, drawn) in zip(cells, panels.items(), strict=False):
        palette = colormaps["tab10" if len(drawn) <= 10 else "tab20"]
        for index, curve in enumerate(drawn):
            colour = palette(index % palette.N)
            label = f"{curve.label} ({curve.runs} runs)" if curve.runs > 1 else curve.label
            few = len(curve.x) < 50
            axes.plot(curve.x, curve.mean, label=label, color=colour, marker="." if few else "")
            if curve.runs > 1:
                low = [m - s for m, s in zip(curve.mean, curve.spread, strict=True)]
                high = [m + s for m, s in zip(curve.mean, curve.spread, strict=True)]
                axes.fill_between(curve.x, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set_xlabel(x)
        axes.set_ylabel(metric)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    write_atomically(
        path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    )
