"""Where the numbers of a run go: files, TensorBoard and wandb behind one interface.

A loop logs a row per log interval (`Logger.log_update`) and one per epoch (`Logger.log_epoch`), and
says once, before the first of them, from where it goes on (`Logger.keep_before`). Files stay whole
whenever a run is killed: no half row, and after a resume no row twice.
"""

import csv
import errno
import io
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vitlinear.errors import UserError
from vitlinear.files import write_text

from .folder import METRICS, SUMMARY, UPDATES

Row = dict[str, Any]


class Logger(ABC):
    """Takes the numbers of a run."""

    @abstractmethod
    def keep_before(self, epoch: int, update: int) -> None:
        """Drops what an earlier run logged after the point from where this one goes on.

        Args:
            epoch: Epochs that are done.
            update: Updates that are done; more than those epochs have, in the middle of one.
        """

    @abstractmethod
    def log_update(self, update: int, values: Mapping[str, Any]) -> None:
        """Takes the numbers of a log interval that ended with ``update``, counted from 1."""

    @abstractmethod
    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Takes the numbers of an epoch; ``epoch`` among them, counted from 1."""

    def close(self, failed: bool = False) -> None:  # noqa: B027
        """Writes what is still in memory; nothing comes after it.

        Args:
            failed: Whether the run ends before its time.
        """


class Loggers(Logger):
    """Files and whatever else logs, as one; a context manager that closes them.

    Attributes:
        rows: Of all epochs so far.
    """

    def __init__(self, files: "FileLogger", others: Sequence[Logger] = ()) -> None:
        self.rows = files.rows
        self.loggers = (files, *others)

    def keep_before(self, epoch: int, update: int) -> None:
        """Has each logger drop what comes after."""
        for logger in self.loggers:
            logger.keep_before(epoch, update)

    def log_update(self, update: int, values: Mapping[str, Any]) -> None:
        """Gives each logger the numbers."""
        for logger in self.loggers:
            logger.log_update(update, values)

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Gives each logger the row."""
        for logger in self.loggers:
            logger.log_epoch(row)

    def close(self, failed: bool = False) -> None:
        """Closes each logger."""
        for logger in self.loggers:
            logger.close(failed)

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)


class FileLogger(Logger):
    """``summary.csv`` and ``metrics.jsonl``, a row per epoch; ``updates.jsonl``, one per interval.

    The first two are small and rewritten whole at each epoch. The last grows all through a run, so
    rows are appended, and `keep_before` cuts off the ones that a resumed run will write again.

    Attributes:
        rows: Of all epochs so far.
    """

    def __init__(self, folder: Path) -> None:
        self.csv, self.metrics = folder / SUMMARY, folder / METRICS
        self.updates = folder / UPDATES
        self.rows: list[Row] = []

    def keep_before(self, epoch: int, update: int) -> None:
        """Takes over the rows of an earlier run, up to where it is resumed.

        Raises:
            UserError: A file holds something other than rows.
        """
        rows = read_rows(self.metrics, "epoch") if self.metrics.is_file() else []
        self.rows[:] = [row for row in rows if row["epoch"] <= epoch]
        if len(self.rows) < len(rows):
            self._write_epochs()
        if self.updates.is_file():
            end = 0
            for row, after in _rows_with_ends(self.updates, "update"):
                # Updates of done epochs have higher numbers where batches were smaller then.
                if row["update"] > update and row.get("epoch", math.inf) > epoch:
                    break
                end = after
            os.truncate(self.updates, end)

    def log_update(self, update: int, values: Mapping[str, Any]) -> None:
        """Appends a row."""
        line = _json_line({"update": update, **values}).encode()
        try:
            with open(self.updates, "ab", buffering=0) as file:
                before = file.tell()
                try:
                    if file.write(line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    # No checkpoint written later may know of an update that this file does not.
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(before)
                    raise
        except OSError as error:
            raise UserError(f"cannot write {self.updates}: {error.strerror or error}") from error

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Adds a row and writes both files."""
        self.rows.append(_finite(row))
        self._write_epochs()

    def _write_epochs(self) -> None:
        write_text(self.metrics, "".join(_json_line(row) for row in self.rows))
        write_text(self.csv, table(self.rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as CSV, with a column for every name that any of them has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_rows(path: Path, key: str) -> list[Row]:
    """Reads a JSON-lines file of numbers; a last line without an end, torn by a kill, is left out.

    Args:
        path: The file.
        key: What every row has, as an integer.

    Raises:
        UserError: The file holds something other than rows.
    """
    return [row for row, _ in _rows_with_ends(path, key)]


def _rows_with_ends(path: Path, key: str) -> Iterator[tuple[Row, int]]:
    """Yields each whole row and the offset in bytes of its end."""
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                row = json.loads(line)
                whole = isinstance(row, dict) and isinstance(row[key], int)
            except (ValueError, KeyError):
                whole = False
            if not whole:
                raise UserError(f"{path} is damaged in line {number}: repair it or move it away")
            yield row, end


def _finite(row: Mapping[str, Any]) -> Row:
    """Replaces what JSON has no word for (NaN, infinities) by None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(_finite(row), allow_nan=False) + "\n"
