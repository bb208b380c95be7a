"""A record of what was finished, in the work directory, for the same call to go on from."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlinear.checkpoints.read import CheckpointError, read_saved
from vitlinear.errors import UserError
from vitlinear.files import write_atomically

from .sums import Sums

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]


@dataclass
class Position:
    """Where a run is.

    Attributes:
        finished: Steps whose map is there, and the tokens before it.
        cuts: Rows of each band of the step that runs; empty before its first band.
        band: Bands of the present pass that are finished.
        sums: Of the step that runs.
        prefix: The tokens before the map of the step that runs, once they are known.
    """

    finished: dict[int, Tensor | None] = field(default_factory=dict)
    cuts: tuple[tuple[int, int], ...] = ()
    band: int = 0
    sums: Sums = field(default_factory=Sums)
    prefix: Tensor | None = None


@contextlib.contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Lock a work directory, where its file system can: two calls in it would damage each other.

    Raises:
        UserError: Another call is using it.
    """
    place = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another call is using {folder}: give another workdir") from error
            except OSError:
                pass  # some network file systems lock no folders
        yield
    finally:
        os.close(place)


class Record:
    """The file.

    A kill loses nothing that was written. After a crash of the machine, rows that were written may
    not be there: a record of an earlier boot does not count.
    """

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        """Look at the folder.

        Args:
            folder: The work directory.
            run: What makes this run: model, source, what is asked for.

        Raises:
            UserError: The folder belongs to another run.
        """
        self.folder = folder
        self.path = folder / "stream.pt"
        self.run = json.dumps({**run, "boot": _boot()}, sort_keys=True)

    def load(self) -> Position:
        """Where an earlier call was interrupted; the start if there was none.

        Raises:
            UserError: The folder belongs to another run.
        """
        if not self.path.exists():
            return Position()
        content = self._read(self.path)
        if content["run"] != self.run:
            if _without_boot(content["run"]) == _without_boot(self.run):
                return Position()
            raise UserError(
                f"{self.folder} holds what another call of stream has begun, for another model, "
                "image or output; give another workdir, or delete it"
            )
        sums = Sums()
        if content["known"]:
            sums.known = self._read(self._sums(content["known"]))
        sums.pending = content["pending"]
        return Position(
            content["finished"], content["cuts"], content["band"], sums, content["prefix"]
        )

    def _read(self, path: Path) -> Any:
        """Content of a file of the record."""
        try:
            return read_saved(path, mmap=False)  # it is written anew while its tensors are in use
        except CheckpointError as error:
            raise UserError(f"cannot read {path}: delete the folder, or give another") from error

    def _sums(self, number: int) -> Path:
        """The file of the sums that are known after this many of them."""
        return self.folder / f"sums-{number}.pt"

    def save_sums(self, position: Position) -> None:
        """Note the sums that are known, which may be large: once, when a pass ends.

        Raises:
            UserError: The file cannot be written.
        """
        known = [tuple(x) for x in position.sums.known]
        write_atomically(self._sums(len(known)), lambda file: torch.save(known, file))

    def save(self, position: Position) -> None:
        """Note where the run is.

        A pass that gathers keys and values is noted when it ends: they are too large to write them
        after each band.

        Raises:
            UserError: The file cannot be written; the one that was there is.
        """
        if position.sums.gathers:
            return
        content = {
            "run": self.run,
            "finished": position.finished,
            "cuts": position.cuts,
            "band": position.band,
            "known": len(position.sums.known),
            "pending": [tuple(x) for x in position.sums.pending],
            "prefix": position.prefix,
        }
        write_atomically(self.path, lambda file: torch.save(content, file))

    def delete(self) -> None:
        """Take the record away, when there is nothing to go on from any more."""
        self.path.unlink(missing_ok=True)
        self.delete_sums()

    def delete_sums(self) -> None:
        """Take the sums of a finished step away."""
        for path in self.folder.glob("sums-*.pt"):
            path.unlink()


def _boot() -> str:
    """A name of this boot of the machine; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _without_boot(run: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(run).items() if key != "boot"}
