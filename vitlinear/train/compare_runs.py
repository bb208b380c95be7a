"""The ``compare-runs`` command: several runs in one plot, and a table of how they ended."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitlinear.cli.flags import file_name, from_arguments
from vitlinear.cli.parser import Parser
from vitlinear.errors import UserError, did_you_mean
from vitlinear.files import check_results, write_text

from .compare_curves import check_format, curves, mean_and_spread, plot
from .progress import clock
from .record.curves import check_plotting
from .record.folder import FILES
from .record.logger import Row, table
from .record.recorded import Recorded, read_runs

# Flags that say where a run is rather than what it is.
PLACES = ("output", "experiment")


@dataclass(frozen=True)
class CompareConfig:
    """Which runs are compared, by what, and where the plot and the table go."""

    runs: tuple[str, ...]
    metric: tuple[str, ...]
    x: str
    group_by: tuple[str, ...]
    output: str
    csv: str | None


def parse_arguments(
    argv: Sequence[str] | None, prog: str = "vitlinear compare-runs"
) -> CompareConfig:
    """Parses flags."""
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
    parser.add_argument(
        "--output", type=file_name, default="compare.png", metavar="FILE", help="'' draws nothing"
    )
    parser.add_argument(
        "--csv", type=file_name, default=None, metavar="FILE", help="the table, unrounded"
    )
    return from_arguments(CompareConfig, parser.parse_args(argv))


def main(argv: Sequence[str] | None, prog: str = "vitlinear compare-runs") -> None:
    """Runs the command."""
    compare(parse_arguments(argv, prog))


def compare(config: CompareConfig) -> None:
    """Prints how runs ended, and writes the plot and the table.

    Raises:
        UserError: A run or a metric is not there, or a file cannot be written.
    """
    read = [Path(run).expanduser() / name for run in config.runs for name in FILES]
    check_results({"--output": config.output, "--csv": config.csv}, read)
    if config.output:
        check_plotting(config.output, ", or give --output ''")
        check_format(Path(config.output))
    runs = read_runs(config.runs)
    check_metrics(runs, config.metric)
    flags = differing_flags(runs)
    groups = group(runs, [name.lstrip("-").replace("-", "_") for name in config.group_by])
    panels = {metric: curves(groups, metric, config.x) for metric in config.metric}
    rows = [summary(run, config.metric) for run in runs]
    settings = [{flag: run.flags.get(flag) for flag in flags} for run in runs]
    print(aligned([shown(row) for row in rows]))
    if config.group_by:
        means = [group_summary(name, members, config.metric) for name, members in groups.items()]
        print("\n" + aligned(means))
    if flags:
        named = [{"run": run.label, **values} for run, values in zip(runs, settings, strict=True)]
        print("\nflags that differ\n" + aligned([shown(row) for row in named]))
    if config.output:
        plot(panels, config.x, Path(config.output))
        print(f"\ncurves: {config.output}")
    if config.csv:
        write_text(Path(config.csv), table([a | b for a, b in zip(rows, settings, strict=True)]))


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
    names = sorted({name for run in runs for name in run.flags} - set(PLACES))
    return [
        name for name in names if any(r.flags.get(name) != runs[0].flags.get(name) for r in runs)
    ]


def group(runs: Sequence[Recorded], flags: Sequence[str]) -> dict[str, list[Recorded]]:
    """Returns the runs by the values of ``flags``; without any, each by itself.

    Raises:
        UserError: No run has such a flag.
    """
    if not flags:
        return {run.label: [run] for run in runs}
    known = {name for run in runs for name in run.flags}
    groups: dict[str, list[Recorded]] = {}
    for flag in flags:
        if flag not in known:
            raise UserError(f"--group-by {flag}: no run has that flag{did_you_mean(flag, known)}")
    for run in runs:
        values = (f"{flag}={run.flags.get(flag)}" for flag in flags)
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
