"""The ``compare-runs`` command: several runs in one plot, and a table of how they ended."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vitlinear.cli.parser import Parser
from vitlinear.errors import UserError, did_you_mean, one_line
from vitlinear.files import check_parent, write_atomically, write_text

from .progress import clock
from .record.curves import check_plotting
from .record.folder import ARGUMENTS, METRICS, UPDATES
from .record.logger import Row, read_rows, table

# Flags that say where a run is rather than what it is.
PLACES = ("output", "experiment")
COUNTS = ("epoch", "updates", "update", "seconds")


@dataclass
class Recorded:
    """A run as its folder tells of it.

    Attributes:
        path: The folder.
        label: Shortest end of the path that no other run has.
        args: Its flags.
        epochs: A row per epoch, with ``elapsed``, the seconds since the start of the run.
        updates: A row per log interval.
    """

    path: Path
    args: dict[str, Any]
    epochs: list[Row]
    updates: list[Row]
    label: str = ""

    def points(self, metric: str, x: str) -> list[tuple[float, float]]:
        """Returns (x, metric) where there is a number; by update, of log intervals if they have it.

        Args:
            metric: Name in the rows.
            x: ``epoch``, ``update`` or ``seconds``.
        """
        rows, count = self.epochs, {"epoch": "epoch", "update": "updates", "seconds": "elapsed"}[x]
        if x == "update" and any(metric in row for row in self.updates):
            rows, count = self.updates, "update"
        pairs = ((row.get(count), row.get(metric)) for row in rows)
        return [(a, b) for a, b in pairs if a is not None and b is not None]

    def metrics(self) -> set[str]:
        """Names that this run has numbers of."""
        rows = (*self.epochs, *self.updates)
        names = {name for row in rows for name, value in row.items() if value is not None}
        return names - {*COUNTS, "elapsed"}


@dataclass
class Curve:
    """What is drawn of a run or of a group of runs: x, mean, standard deviation (0 of one run)."""

    label: str
    x: list[float] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    runs: int = 1


def main(argv: Sequence[str] | None, prog: str = "vitlinear compare-runs") -> None:
    """Runs the command."""
    parser = Parser(prog=prog, description="Plot runs of `vitlinear train` and print how they end.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument(
        "--metric", nargs="+", default=["train_loss", "eval_top1"], metavar="NAME",
        help="columns of summary.csv (default: train_loss eval_top1)",
    )  # fmt: skip
    parser.add_argument("--x", default="epoch", choices=("epoch", "update", "seconds"))
    parser.add_argument(
        "--group-by", nargs="+", default=[], metavar="FLAG",
        help="draw mean and spread of runs in which these flags agree, e.g. model over seeds",
    )  # fmt: skip
    parser.add_argument("--output", default="compare.png", metavar="FILE", help="'' draws nothing")
    parser.add_argument("--csv", default=None, metavar="FILE", help="the table, unrounded")
    args = parser.parse_args(argv)
    check_parent(args.csv)
    if args.output:
        check_parent(args.output)
        check_plotting(args.output, ", or give --output ''")
        check_format(Path(args.output))
    runs = read_runs(args.runs)
    check_metrics(runs, args.metric)
    flags = differing_flags(runs)
    groups = group(runs, [name.lstrip("-").replace("-", "_") for name in args.group_by])
    panels = {metric: curves(groups, metric, args.x) for metric in args.metric}
    rows = [summary(run, args.metric) for run in runs]
    settings = [{flag: run.args.get(flag) for flag in flags} for run in runs]
    print(aligned([shown(row) for row in rows]))
    if args.group_by:
        means = [group_summary(name, members, args.metric) for name, members in groups.items()]
        print("\n" + aligned(means))
    if flags:
        named = [{"run": run.label, **values} for run, values in zip(runs, settings, strict=True)]
        print("\nflags that differ\n" + aligned([shown(row) for row in named]))
    if args.output:
        plot(panels, args.x, Path(args.output))
        print(f"\ncurves: {args.output}")
    if args.csv:
        write_text(Path(args.csv), table([a | b for a, b in zip(rows, settings, strict=True)]))


def read_runs(paths: Sequence[str]) -> list[Recorded]:
    """Reads run folders; one that is named twice counts once.

    Raises:
        UserError: One is not a run folder, or has no finished epoch yet.
    """
    unique = dict.fromkeys(Path(path).expanduser().resolve() for path in paths)
    runs = [read_run(path) for path in unique]
    for run, label in zip(runs, labels(list(unique)), strict=True):
        run.label = label
    return runs


def read_run(path: Path) -> Recorded:
    """Reads one run folder."""
    for needed in (path, path / ARGUMENTS):
        if not needed.exists():
            lacks = "it does not exist" if needed == path else f"it has no {ARGUMENTS}"
            raise UserError(f"{path} is no run of `vitlinear train`: {lacks}")
    try:
        args = yaml.safe_load((path / ARGUMENTS).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path / ARGUMENTS} cannot be read: {one_line(error)}") from error
    if not isinstance(args, dict):
        raise UserError(f"{path / ARGUMENTS} holds no flags of `vitlinear train`")
    epochs = read_rows(path / METRICS, "epoch") if (path / METRICS).is_file() else []
    if not epochs:
        raise UserError(f"{path} has no finished epoch yet: leave it out")
    updates = read_rows(path / UPDATES, "update") if (path / UPDATES).is_file() else []
    elapsed = 0.0
    for row in epochs:
        elapsed += row.get("seconds") or 0.0
        row["elapsed"] = elapsed
    return Recorded(path, args, epochs, updates)


def labels(paths: Sequence[Path]) -> list[str]:
    """Returns the shortest end of each path that tells it from the others."""
    found = []
    for path in paths:
        ends = ("/".join(path.parts[-depth:]) for depth in range(1, len(path.parts) + 1))
        others = [f"/{other}" for other in paths if other != path]
        alone = (end for end in ends if not any(o.endswith(f"/{end}") for o in others))
        found.append(next(alone, str(path)))
    return found


def check_metrics(runs: Sequence[Recorded], metrics: Sequence[str]) -> None:
    """Raises `UserError` if a run lacks a metric."""
    common = set.intersection(*(run.metrics() for run in runs))
    for metric in metrics:
        lacking = [run.label for run in runs if metric not in run.metrics()]
        if lacking:
            raise UserError(
                f"no {metric} in {', '.join(lacking)}; "
                f"in all runs: {', '.join(sorted(common)) or 'nothing'}"
            )


def differing_flags(runs: Sequence[Recorded]) -> list[str]:
    """Returns the flags that are not the same in all runs, in the order of their names."""
    names = sorted({name for run in runs for name in run.args} - set(PLACES))
    return [name for name in names if any(r.args.get(name) != runs[0].args.get(name) for r in runs)]


def group(runs: Sequence[Recorded], flags: Sequence[str]) -> dict[str, list[Recorded]]:
    """Returns the runs by the values of ``flags``; without any, each by itself.

    Raises:
        UserError: No run has such a flag.
    """
    if not flags:
        return {run.label: [run] for run in runs}
    known = {name for run in runs for name in run.args}
    groups: dict[str, list[Recorded]] = {}
    for flag in flags:
        if flag not in known:
            raise UserError(f"--group-by {flag}: no run has that flag{did_you_mean(flag, known)}")
    for run in runs:
        values = (f"{flag}={run.args.get(flag)}" for flag in flags)
        groups.setdefault(", ".join(values), []).append(run)
    return groups


def lower_is_better(metric: str) -> bool:
    """Whether the best value of a metric is its smallest."""
    return any(word in metric for word in ("loss", "memory", "wait", "skipped", "bad_images"))


def summary(run: Recorded, metrics: Sequence[str]) -> Row:
    """Returns how a run ended: last and best of each metric, median speed, memory, time."""
    row: Row = {"run": run.label, "epochs": run.epochs[-1]["epoch"]}
    for metric in metrics:
        points = run.points(metric, "epoch") or run.points(metric, "update")
        best = min if lower_is_better(metric) else max
        where, value = best(points, key=lambda point: point[1])
        row |= {metric: points[-1][1], f"best {metric}": value, f"best {metric} at": where}
    for name, of, over in (
        ("images/s", "images_per_s", statistics.median),
        ("peak GiB", "peak_memory_gib", max),
    ):
        values = [value for _, value in run.points(of, "epoch")]
        row[name] = over(values) if values else None
    return row | {"seconds": run.epochs[-1]["elapsed"]}


def group_summary(name: str, members: Sequence[Recorded], metrics: Sequence[str]) -> dict[str, str]:
    """Returns mean and standard deviation over the runs of a group, as text."""
    row = {"group": name, "runs": str(len(members))}
    ends = [summary(run, metrics) for run in members]
    for key in [name for metric in metrics for name in (metric, f"best {metric}")]:
        mean, spread = mean_and_spread([end[key] for end in ends])
        row[key] = f"{mean:.4g}" + (f" ± {spread:.2g}" if len(members) > 1 else "")
    return row


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and the sample standard deviation, which is 0 of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


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


def shown(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns a row of `summary` for the eye: ``80 @2`` is a best value and its epoch."""
    text = {}
    for name, value in row.items():
        if name == "seconds":
            text["time"] = clock(value)
        elif name.endswith(" at"):
            text[name.removesuffix(" at")] += f" @{value}"
        elif value is None:
            text[name] = "-"
        else:
            text[name] = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text


def aligned(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns rows as a table; cells are cut at 32 characters."""
    names = list(rows[0])
    lines = [names, *([row[name] for name in names] for row in rows)]
    cut = [[cell if len(cell) <= 32 else f"{cell[:29]}..." for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cut, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cut
    )
