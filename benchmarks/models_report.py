"""Table, fitted exponents and plot of what `benchmarks/models.py` measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitlinear.benchmark.report import (
    curves,
    error_cell,
    exponents,
    line_style,
    mark_sides,
    measured,
    ratio,
)
from vitlinear.files import write_atomically

Row = dict[str, Any]
COLUMNS = ("model", "mode", "pass", "size", "batch", "images/s", "ratio", "p50, ms", "p90", "p99",
           "calls", "memory, MiB", "tensors", "GMACs", "img/s/GMAC", "GMACs/s")  # fmt: skip
BY = ("model", "mode", "task", "batch")  # of curves


def size(row: Row) -> str:
    """Height and width."""
    return f"{row['height']}x{row['width']}"


def condition(row: Row) -> tuple[Any, ...]:
    """Pass, size and batch: the same for all rows that took turns."""
    return row["task"], row["height"], row["width"], row["batch"]


def reference_of(row: Row, rows: Sequence[Row], name: str) -> Row | None:
    """The reference's row in the same mode and condition, if it ran."""
    for other in measured(rows):
        same = other["mode"] == row["mode"] and condition(other) == condition(row)
        if same and other["model"] == name:
            return other
    return None


def table(rows: Sequence[Row], reference: str) -> list[str]:
    """A Markdown table; ``ratio`` is to the reference in the same mode."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in rows:
        cells = [row["model"], row["mode"], row["task"], size(row), str(row["batch"])]
        if "error" in row:
            cells.append(error_cell(row))  # the file has the whole text
            cells += [""] * (len(COLUMNS) - len(cells))
        else:
            other, memory = reference_of(row, rows, reference), row["memory_MiB"]
            cells += [f"{row['images_per_s']:.4g}", f"{ratio(row, other):.2f}" if other else ""]
            cells += [f"{row[f'p{percent}_ms']:.4g}" for percent in (50, 90, 99)]
            cells += [str(row["calls"]), "" if memory is None else f"{memory:.1f}"]
            cells.append(f"{row['tensors_MiB']:.1f}")
            cost, speed = row["gmacs"], row["images_per_s"]
            cells += [f"{value:.4g}" for value in (cost, speed / cost, speed * cost)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def best_modes(rows: Sequence[Row], reference: str) -> list[str]:
    """Each model in its fastest mode against the reference in its own, for each condition."""
    lines = []
    for key in dict.fromkeys(condition(row) for row in measured(rows)):
        best: dict[str, Row] = {}
        for row in measured(rows):
            known = best.get(row["model"])
            faster = known is None or row["images_per_s"] > known["images_per_s"]
            if condition(row) == key and faster:
                best[row["model"]] = row
        other = best.get(reference)
        if other is None:
            continue
        found = [
            f"{name} {ratio(row, other):.2f} ({row['mode']})"
            for name, row in best.items()
            if row is not other
        ]
        if found:
            start = f"{key[0]} at {size(other)}, batch {key[3]}, each in its best mode, over "
            lines.append(f"{start}{reference} ({other['mode']}): {', '.join(found)}")
    return lines


def print_report(record: dict[str, Any]) -> None:
    """The table and what follows from it, on standard output."""
    rows, reference = record["rows"], record["reference"]
    print(f"{record['machine']}; torch {record['torch']}, commit {record['commit']}\n")
    print("\n".join(table(rows, reference)))
    for title, lines in (
        (None, best_modes(rows, reference)),
        ("Time grows with", exponents(rows, BY)),
    ):
        if lines:
            print("", *([title] if title else []), *(f"- {line}" for line in lines), sep="\n")


def plot(record: dict[str, Any], path: Path) -> None:
    """Draws images/s and peak memory against the resolution, a column for each pass."""
    from matplotlib.figure import Figure

    lines = curves(record["rows"], BY)
    tasks = list(dict.fromkeys(row["task"] for row in record["rows"]))
    models = list(dict.fromkeys(row["model"] for row in record["rows"]))
    modes = list(dict.fromkeys(row["mode"] for row in record["rows"]))
    batches = list(dict.fromkeys(row["batch"] for row in record["rows"]))
    figure = Figure(figsize=(6 * len(tasks), 8), layout="constrained")
    panels = figure.subplots(2, len(tasks), squeeze=False)
    for column, task in enumerate(tasks):
        for axes, name, label in zip(
            panels[:, column],
            ("images_per_s", "memory_MiB"),
            ("images/s", "peak memory of a call, MiB"),
            strict=True,
        ):
            sides: set[float] = set()
            for (model, mode, of, batch), rows in lines.items():
                points = [
                    ((row["height"] * row["width"]) ** 0.5, row[name]) for row in rows if row[name]
                ]
                if of == task and points:
                    sides |= {side for side, _ in points}
                    text = [model, *([mode] * (len(modes) > 1))]
                    axes.loglog(
                        *zip(*points, strict=True),
                        label=", ".join([*text, *([f"batch {batch}"] * (len(batches) > 1))]),
                        **line_style(models.index(model), modes.index(mode), batches.index(batch)),
                    )
            mark_sides(axes, sides)
            axes.set_ylabel(label)
            axes.set_title("inference" if task == "forward" else "training step")
    handles = {line.get_label(): line for axes in panels.flat for line in axes.lines}
    if handles:
        where = {"loc": "outside lower center", "ncols": 2 * len(tasks), "fontsize": "small"}
        figure.legend(handles.values(), handles.keys(), **where)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
