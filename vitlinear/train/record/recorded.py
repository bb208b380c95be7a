"""Finished epochs of runs, read from their folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vitlinear.errors import UserError, one_line

from .folder import ARGUMENTS, METRICS, UPDATES
from .logger import Row, read_rows

COUNTS = ("epoch", "updates", "update", "seconds")


@dataclass
class Recorded:
    """A run as its folder tells of it.

    Attributes:
        path: The folder.
        label: Shortest end of the path that no other run has.
        flags: As ``args.yaml`` has them.
        epochs: A row per epoch, with ``elapsed``, the seconds since the start of the run.
        updates: A row per log interval.
    """

    path: Path
    flags: dict[str, Any]
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
        flags = yaml.safe_load((path / ARGUMENTS).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path / ARGUMENTS} cannot be read: {one_line(error)}") from error
    if not isinstance(flags, dict):
        raise UserError(f"{path / ARGUMENTS} holds no flags of `vitlinear train`")
    epochs = read_rows(path / METRICS, "epoch") if (path / METRICS).is_file() else []
    if not epochs:
        raise UserError(f"{path} has no finished epoch yet: leave it out")
    updates = read_rows(path / UPDATES, "update") if (path / UPDATES).is_file() else []
    elapsed = 0.0
    for row in epochs:
        elapsed += row.get("seconds") or 0.0
        row["elapsed"] = elapsed
    return Recorded(path, flags, epochs, updates)


def labels(paths: Sequence[Path]) -> list[str]:
    """Returns the shortest end of each path that tells it from the others."""
    found = []
    for path in paths:
        ends = ("/".join(path.parts[-depth:]) for depth in range(1, len(path.parts) + 1))
        others = [f"/{other}" for other in paths if other != path]
        alone = (end for end in ends if not any(o.endswith(f"/{end}") for o in others))
        found.append(next(alone, str(path)))
    return found
