"""Tables of `fashion_mnist`: means over seeds, paired differences, speed and memory."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

BASELINES = ("softmax", "elu")


class Difference(NamedTuple):
    """Mean of paired differences and half the width of its 95 % interval, by Student's t.

    A single pair has no interval.
    """

    mean: float
    half_width: float | None

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Compare two attentions seed by seed: a seed gives both one order and one set of weights."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    count = len(differences)
    if count < 2:
        return Difference(statistics.fmean(differences), None)
    error = statistics.stdev(differences) / math.sqrt(count)
    return Difference(statistics.fmean(differences), float(stats.t.ppf(0.975, count - 1)) * error)


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The records of a study, in the order of skeleton, images, attention and seed."""
    runs = [json.loads(path.read_text()) for path in folder.glob("runs/*.json")]
    return sorted(runs, key=lambda r: (r["skeleton"], r["images"], r["attention"], r["seed"]))


def summarise(runs: list[dict[str, Any]], attentions: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each attention in each skeleton and schedule, over its own seeds.

    Differences are those of the seeds that both attentions have. A run that failed leaves its
    attention without a mean.
    """
    groups: dict[tuple[str, int], dict[str, dict[int, float | None]]] = {}
    for run in runs:
        group = groups.setdefault((run["skeleton"], run["images"]), {})
        group.setdefault(run["attention"], {})[run["seed"]] = run.get("eval_top1")
    rows: list[dict[str, Any]] = []
    for (skeleton, images), group in groups.items():
        for name in (attention for attention in attentions if attention in group):
            mine = dict(sorted(group[name].items()))
            row: dict[str, Any] = {"skeleton": skeleton, "images": images, "attention": name}
            row |= {"seeds": [*mine], "top1": [*mine.values()]}
            values = [x for x in mine.values() if x is not None]
            if len(values) == len(mine):
                row["mean"] = statistics.fmean(values)
                row["sd"] = statistics.stdev(values) if len(values) > 1 else None
                for base in BASELINES:
                    theirs = group.get(base, {})
                    pairs = [(x, theirs.get(seed)) for seed, x in mine.items()]
                    both = [(x, y) for x, y in pairs if x is not None and y is not None]
                    if name != base and both:
                        row[f"minus_{base}"] = paired_difference(*zip(*both, strict=True))
            rows.append(row)
    return rows


def _top1(value: float | None) -> str:
    return "failed" if value is None else f"{value:.2f}"


def _difference(value: Difference | None) -> str:
    if value is None:
        return ""
    if value.half_width is None:
        return f"{value.mean:+.2f}"
    text = f"{value.mean:+.2f} ± {value.half_width:.2f}"
    return f"**{text}**" if value.is_significant else text


def accuracy_tables(rows: list[dict[str, Any]]) -> str:
    """Markdown, one table for each skeleton and schedule."""
    tables = []
    for skeleton, images in dict.fromkeys((row["skeleton"], row["images"]) for row in rows):
        mine = [row for row in rows if (row["skeleton"], row["images"]) == (skeleton, images)]
        seeds = sorted({seed for row in mine for seed in row["seeds"]})
        header = ["attention", *(f"seed {seed}" for seed in seeds), "mean", "sd"]
        header += [f"minus {base}" for base in BASELINES]
        lines = [f"Top-1 in %, {skeleton}, one pass over {images:,} images:", ""]
        lines += [" | ".join(["", *header, ""]).strip()]
        lines += ["|" + " --- |" * len(header)]
        for row in mine:
            found = dict(zip(row["seeds"], row["top1"], strict=True))
            cells = [_top1(found[seed]) if seed in found else "" for seed in seeds]
            cells += [f"{row[k]:.2f}" if row.get(k) is not None else "" for k in ("mean", "sd")]
            cells += [_difference(row.get(f"minus_{base}")) for base in BASELINES]
            lines.append(f"| {row['attention']} | " + " | ".join(cells) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def speed_table(speed: dict[str, Any]) -> str:
    """Markdown: images/s and MiB by attention, for each skeleton and side."""
    rows = speed["rows"]
    columns = list(dict.fromkeys((row["skeleton"], row["side"], row["batch"]) for row in rows))
    found = {(row["attention"], row["skeleton"], row["side"]): row for row in rows}
    header = [f"{skeleton}, {side}, batch {batch}" for skeleton, side, batch in columns]
    lines = [f"Images/s of training steps, peak MiB; float32, {speed['machine']}:", ""]
    lines += ["| attention | " + " | ".join(header) + " |", "|" + " --- |" * (1 + len(header))]
    for name in dict.fromkeys(row["attention"] for row in rows):
        cells = []
        for skeleton, side, _ in columns:
            row = found[name, skeleton, side]
            cells.append(f"{row['images_per_s']:.0f}, {row['peak_MiB']:.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_between(path: Path, marker: str, text: str) -> None:
    """Replace what stands between ``<!-- marker -->`` and ``<!-- /marker -->``.

    Raises:
        ValueError: The file has no such place.
    """
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, found, rest = path.read_text().partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path} has no place between {start} and {end}")
    path.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}")


def write_tables(folder: Path, groups: Sequence[Sequence[str]], results: Path, page: Path) -> None:
    """Collect the records of a study into one JSON file and the tables of its account.

    Args:
        folder: Holds ``runs/*.json`` and, if it was measured, ``speed.json``.
        groups: Attentions that are compared with one another, in the order of the rows; the first
            group's rows are those of an attention that is in several.
        results: JSON file to write.
        page: File with a place for ``fashion-mnist``.
    """
    runs = read_runs(folder)
    speed_file = folder / "speed.json"
    speed = json.loads(speed_file.read_text()) if speed_file.exists() else None
    if speed is None and results.exists():
        speed = json.loads(results.read_text()).get("speed")
    tables = [summarise([r for r in runs if r["attention"] in group], group) for group in groups]
    told: dict[tuple[str, int, str], dict[str, Any]] = {}
    for row in (row for rows in tables for row in rows):
        told.setdefault((row["skeleton"], row["images"], row["attention"]), row)
    summary = [
        {k: v._asdict() if isinstance(v, Difference) else v for k, v in row.items()}
        for row in told.values()
    ]
    record = {"runs": runs, "summary": summary, "speed": speed}
    results.write_text(json.dumps(record, indent=1) + "\n")
    text = "\n\n".join(accuracy_tables(rows) for rows in tables if rows)
    text += f"\n\n{speed_table(speed)}" if speed else ""
    write_between(page, "fashion-mnist", text)
    print(text)
