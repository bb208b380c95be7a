"""Table, exponents and plot of what `vitlinear benchmark` measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitlinear.checkpoints.load import same_model
from vitlinear.files import write_atomically

Row = Mapping[str, Any]
BASE = "pytorch"  # the runtime that the others are compared with
BY = ("model", "runtime", "batch")


def ratio(row: Row, reference: Row) -> float:
    """Images/s over those of the reference: the median over rounds."""
    pairs = zip(row["round_ms"], reference["round_ms"], strict=True)
    return statistics.median(theirs / ours for ours, theirs in pairs)


def exponent(pixels: Sequence[int], times: Sequence[float]) -> float:
    """The slope of log time over log pixels by least squares: 1 is linear."""
    return float(np.polyfit(np.log(pixels), np.log(times), 1)[0])


def measured(rows: Iterable[Row]) -> list[Row]:
    """Those that ran."""
    return [row for row in rows if "error" not in row]


def find(rows: Iterable[Row], like: Row, model: str, runtime: str) -> Row | None:
    """The row of a model in a runtime that took turns with another, if it ran."""
    for row in measured(rows):
        if size(row) == size(like) and (row["model"], row["runtime"]) == (model, runtime):
            return row
    return None


def in_pytorch(rows: Iterable[Row], like: Row) -> Row | None:
    """The row in PyTorch of the model that another row is of, whatever weights either names."""
    for row in measured(rows):
        beside = size(row) == size(like) and row["runtime"] == BASE
        if beside and same_model(row["model"], like["origin"]):
            return row
    return None


def size(row: Row) -> str:
    """Batch, height and width."""
    return f"{row['batch']} x {row['height']} x {row['width']}"


def error_cell(row: Row) -> str:
    """Why a row has no times, short and without bars, which would begin cells."""
    text: str = row["error"].replace("|", "/")[:160]
    return text


def table(rows: Sequence[Row], reference: str) -> list[str]:
    """A Markdown table; see `legend` for its columns."""
    profiled = any("multiplying_ms" in row for row in rows)
    columns = ["model", "runtime", "size", "ms", "spread", "images/s", f"of {BASE}"]
    columns += [f"of {reference}"] + ["products, ms", "all / products"] * profiled
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [row["model"], row["runtime"], size(row)]
        if "error" in row:
            cells.append(error_cell(row))
        else:
            spread = (row["p90_ms"] - row["p10_ms"]) / row["p50_ms"]
            cells += [f"{row['p50_ms']:.4g}", f"{spread:.0%}", f"{row['images_per_s']:.4g}"]
            own, other = in_pytorch(rows, row), find(rows, row, reference, row["runtime"])
            cells += [f"{ratio(row, each):.2f}" if each else "" for each in (own, other)]
            if "multiplying_ms" in row:
                products = row["multiplying_ms"]
                cells += [f"{products:.4g}", f"{over_products(row):.2f}" if products else ""]
        cells += [""] * (len(columns) - len(cells))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def over_products(row: Row) -> float:
    """Time of all steps over that of products, both of the same profiled call.

    Times of the turns are from other moments, in which a shared processor is slower or faster.
    """
    everything: float = sum(row["kinds_ms"].values())
    return everything / float(row["multiplying_ms"])


def legend(reference: str, profiled: bool) -> str:
    """The meaning of the columns, in a paragraph."""
    text = (
        "ms: median time of a batch; spread: 90th less 10th percentile, over the median; "
        f"of {BASE}: images/s over those of the same model, fused, in PyTorch; of {reference}: "
        "likewise, over that model in the same runtime."
    )
    if profiled:
        text += (
            " products: matrix products, convolutions and softmax attention, by the runtime's own "
            "profile of one call; all / products: the time of all steps of that call over it."
        )
    return text


def curves(rows: Sequence[Row], by: Sequence[str] = BY) -> dict[tuple[Any, ...], list[Row]]:
    """Rows that ran by some of their fields, each in the order of pixels."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(measured(rows), key=lambda row: row["height"] * row["width"]):
        found.setdefault(tuple(row[name] for name in by), []).append(row)
    return found


def exponents(rows: Sequence[Row], by: Sequence[str] = BY) -> list[str]:
    """How time grows with pixels, where several sizes ran.

    Args:
        rows: All of them.
        by: Fields that tell the curves apart; the last is the batch.
    """
    lines = []
    for (*names, batch), points in curves(rows, by).items():
        pixels = [row["height"] * row["width"] for row in points]
        if len(set(pixels)) > 1:
            power = exponent(pixels, [row["p50_ms"] for row in points])
            span = " to ".join(f"{row['height']}x{row['width']}" for row in (points[0], points[-1]))
            lines.append(f"{', '.join(names)}, batch {batch}: pixels^{power:.3f}, {span}")
    return lines


def print_report(record: Mapping[str, Any]) -> None:
    """Prints the table and the exponents."""
    rows, reference = record["rows"], record["reference"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    print(f"{record['machine']}; {versions}; commit {record['commit']}\n")
    print("\n".join(table(rows, reference)))
    print("\n" + legend(reference, any("multiplying_ms" in row for row in rows)))
    if lines := exponents(rows):
        print("\nTime grows with", *(f"- {line}" for line in lines), sep="\n")


def mark_sides(axes: Any, sides: Iterable[float]) -> None:
    """Labels a horizontal axis of resolutions, and both axes with plain numbers."""
    from matplotlib.ticker import LogFormatter, NullLocator

    ticks = sorted(sides)
    axes.set_xticks(ticks, [f"{side:.0f}" for side in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.set_xlabel("side of the image in pixels (square root of their number)")
    axes.grid(alpha=0.3, which="both")


def line_style(model: int, mode: int, batch: int) -> dict[str, str]:
    """The look of a line by the numbers of its model, its mode or runtime, and its batch."""
    return {
        "color": f"C{model}",
        "linestyle": ("-", "--", ":", "-.")[mode % 4],
        "marker": "os^Dv<>"[batch % 7],
    }


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draws images/s against the side of the image; for one size, as bars.

    Args:
        record: What was measured.
        path: PNG or SVG, by its suffix.
    """
    from matplotlib.figure import Figure

    lines = curves(record["rows"])
    models = list(dict.fromkeys(model for model, _, _ in lines))
    runtimes = list(dict.fromkeys(runtime for _, runtime, _ in lines))
    batches = list(dict.fromkeys(batch for _, _, batch in lines))
    sizes = {(row["height"], row["width"]) for row in measured(record["rows"])}
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for (model, runtime, batch), rows in lines.items():
        label = ", ".join([model, runtime, *([f"batch {batch}"] * (len(batches) > 1))])
        if len(sizes) == 1:
            axes.barh(label, rows[0]["images_per_s"], color=f"C{runtimes.index(runtime)}")
            continue
        axes.loglog(
            [(row["height"] * row["width"]) ** 0.5 for row in rows],
            [row["images_per_s"] for row in rows],
            label=label,
            **line_style(models.index(model), runtimes.index(runtime), batches.index(batch)),
        )
    if len(sizes) == 1:
        axes.invert_yaxis()
        ((height, width),) = sizes
        axes.set_xlabel(f"images/s at {height} x {width} pixels")
        axes.grid(alpha=0.3, axis="x")
    else:
        mark_sides(axes, {(height * width) ** 0.5 for height, width in sizes})
        axes.set_ylabel("images/s")
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    axes.set_title(record["machine"], fontsize="small")
    kind = path.suffix.removeprefix(".")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=120))
