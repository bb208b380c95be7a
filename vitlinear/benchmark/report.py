"""Table, exponents and plot of what `vitlinear benchmark` measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitlinear.files import write_atomically

Row = Mapping[str, Any]
BASE = "pytorch"  # the runtime that the others are compared with


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
        same = all(row[key] == like[key] for key in ("batch", "height", "width"))
        if same and (row["model"], row["runtime"]) == (model, runtime):
            return row
    return None


def size(row: Row) -> str:
    """Batch, height and width."""
    return f"{row['batch']} x {row['height']} x {row['width']}"


def table(rows: Sequence[Row], reference: str) -> list[str]:
    """A Markdown table; see `legend` for its columns."""
    profiled = any("multiplying_ms" in row for row in rows)
    columns = ["model", "runtime", "size", "ms", "spread", "images/s", f"of {BASE}"]
    columns += [f"of {reference}"] + ["products, ms", "time / products"] * profiled
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [row["model"], row["runtime"], size(row)]
        if "error" in row:
            cells.append(row["error"].replace("|", "/")[:160])  # a bar would begin a cell
        else:
            spread = (row["p90_ms"] - row["p10_ms"]) / row["p50_ms"]
            cells += [f"{row['p50_ms']:.4g}", f"{spread:.0%}", f"{row['images_per_s']:.4g}"]
            own, other = (
                find(rows, row, row["origin"], BASE),
                find(rows, row, reference, row["runtime"]),
            )
            cells += [f"{ratio(row, each):.2f}" if each else "" for each in (own, other)]
            if "multiplying_ms" in row:
                products = row["multiplying_ms"]
                cells += [f"{products:.4g}", f"{row['p50_ms'] / products:.2f}" if products else ""]
        cells += [""] * (len(columns) - len(cells))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


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
            "profile."
        )
    return text


def curves(rows: Sequence[Row]) -> dict[tuple[str, str, int], list[Row]]:
    """Rows that ran by model, runtime and batch, each in the order of pixels."""
    found: dict[tuple[str, str, int], list[Row]] = {}
    for row in sorted(measured(rows), key=lambda row: row["height"] * row["width"]):
        found.setdefault((row["model"], row["runtime"], row["batch"]), []).append(row)
    return found


def exponents(rows: Sequence[Row]) -> list[str]:
    """How time grows with pixels, where several sizes ran."""
    lines = []
    for (model, runtime, batch), points in curves(rows).items():
        pixels = [row["height"] * row["width"] for row in points]
        if len(set(pixels)) > 1:
            power = exponent(pixels, [row["p50_ms"] for row in points])
            span = " to ".join(f"{row['height']}x{row['width']}" for row in (points[0], points[-1]))
            lines.append(f"{model}, {runtime}, batch {batch}: pixels^{power:.3f}, {span}")
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


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draws images/s against the side of the image; for one side, as bars.

    Args:
        record: What was measured.
        path: PNG or SVG, by its suffix.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, NullLocator

    lines = curves(record["rows"])
    models = list(dict.fromkeys(model for model, _, _ in lines))
    runtimes = list(dict.fromkeys(runtime for _, runtime, _ in lines))
    batches = list(dict.fromkeys(batch for _, _, batch in lines))
    sides = sorted({(row["height"] * row["width"]) ** 0.5 for row in measured(record["rows"])})
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for (model, runtime, batch), rows in lines.items():
        label = ", ".join([model, runtime, *([f"batch {batch}"] * (len(batches) > 1))])
        if len(sides) == 1:
            axes.barh(label, rows[0]["images_per_s"], color=f"C{runtimes.index(runtime)}")
            continue
        axes.loglog(
            [(row["height"] * row["width"]) ** 0.5 for row in rows],
            [row["images_per_s"] for row in rows],
            label=label,
            color=f"C{models.index(model)}",
            linestyle=("-", "--", ":", "-.")[runtimes.index(runtime) % 4],
            marker="os^Dv<>"[batches.index(batch) % 7],
        )
    if len(sides) == 1:
        axes.invert_yaxis()
        axes.set_xlabel(f"images/s at {sides[0]:.0f} x {sides[0]:.0f} pixels")
        axes.grid(alpha=0.3, axis="x")
    else:
        axes.set_xticks(sides, [f"{side:.0f}" for side in sides])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
        axes.set_xlabel("side of the image in pixels (square root of their number)")
        axes.set_ylabel("images/s")
        axes.grid(alpha=0.3, which="both")
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    axes.set_title(record["machine"], fontsize="small")
    kind = path.suffix.removeprefix(".")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=120))
