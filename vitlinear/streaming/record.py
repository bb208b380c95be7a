"""What was finished, in a file of the work directory, for the same call to go on from."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlinear.errors import UserError
from vitlinear.files import write_atomically

from .sums import Pieces, Sums


@dataclass
class Position:
    """Where a run is.

    Attributes:
        finished: Steps whose map is there, and the tokens before it.
        cuts: Rows of each band of the step that runs; empty before its first band.
        band: Bands of the present pass that are finished.
        sums: Of the step that runs.
    """

    finished: dict[int, Tensor | None] = field(default_factory=dict)
    cuts: tuple[tuple[int, int], ...] = ()
    band: int = 0
    sums: Sums = field(default_factory=Sums)


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
        try:
            content = torch.load(self.path, weights_only=True)
        except FileNotFoundError:
            return Position()
        except Exception as error:
            raise UserError(f"cannot read {self.path}: delete the folder, or give another") from (
                error
            )
        if content["run"] != self.run:
            if _without_boot(content["run"]) == _without_boot(self.run):
                return Position()
            raise UserError(
                f"{self.folder} holds what another call of stream has begun, for another model, "
                "image or output; give another workdir, or delete it"
            )
        sums = Sums()
        sums.known = content["known"]
        sums.pending = [
            Pieces(x["axis"], x["pieces"]) if isinstance(x, dict) else x for x in content["pending"]
        ]
        return Position(content["finished"], content["cuts"], content["band"], sums)

    def save(self, position: Position) -> None:
        """Note where the run is.

        Raises:
            UserError: The file cannot be written; the one that was there is.
        """
        pending = [
            {"axis": x.axis, "pieces": x.pieces} if isinstance(x, Pieces) else tuple(x)
            for x in position.sums.pending
        ]
        content = {
            "run": self.run,
            "finished": position.finished,
            "cuts": position.cuts,
            "band": position.band,
            "known": [tuple(x) for x in position.sums.known],
            "pending": pending,
        }
        write_atomically(self.path, lambda file: torch.save(content, file))

    def delete(self) -> None:
        """Take the file away."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


def _boot() -> str:
    """What tells this boot of the machine from others; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _without_boot(run: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(run).items() if key != "boot"}
