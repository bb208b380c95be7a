"""The policy for images that cannot be read: an error, or left out, recorded and listed.

Images are read in data workers, processes that end with the epoch. Each appends what it met to a
journal, a file on the machine's own disk, one write a line, which Linux does not interleave; the
process that the workers belong to reads it, and the processes of a run put theirs together.
"""

import os
import tempfile
import uuid
import weakref
from collections.abc import Iterable
from pathlib import Path

from torch import distributed

from vitlinear.cli.parser import Parser
from vitlinear.errors import UserError, one_line
from vitlinear.files import write_text

from .images import UnreadableImage

BAD_IMAGES = "bad_images.txt"  # in the folder of a run
# The label of a held-out image that could not be read: torch's losses ignore it by default, and
# no data set has it (-1 is what several say of images without a label).
UNREADABLE = -100
# So many one after the other are no damaged files but a disk or a share that is gone.
LIMIT = 10


def add_bad_images_flag(parser: Parser) -> None:
    """Adds ``--bad-images``, whose value `BadImages.by_flag` takes."""
    parser.group("unreadable images").add_argument(
        "--bad-images",
        default="error",
        choices=("error", "skip"),
        help="unreadable images: stop, or go on without them and list them (of a run, in "
        "bad_images.txt)",
    )


class BadImages:
    """The policy of a run, and what its processes met.

    Args:
        skip: Leave unreadable images out; otherwise the first is an error.
    """

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.journal = Path(tempfile.gettempdir(), f"vitlinear-bad-images-{uuid.uuid4().hex}")
        self.found: dict[str, str] = {}
        self.owner = os.getpid()
        weakref.finalize(self, _remove, self.journal, self.owner)

    @classmethod
    def by_flag(cls, value: str) -> "BadImages":
        """Returns the policy that ``--bad-images`` says: ``error`` or ``skip``."""
        return cls(skip=value == "skip")

    def add(self, error: UnreadableImage) -> None:
        """Records an unreadable image; called in any process.

        Raises:
            UserError: Unreadable images are errors, or the record cannot be written.
        """
        if not self.skip:
            raise error.as_user_error("replace or remove it, or --bad-images skip") from error
        if error.name in self.found:
            return
        self.found[error.name] = error.reason
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        try:
            file = os.open(self.journal, flags, 0o600)
            try:
                os.write(file, _line(error.name, error.reason).encode())
            finally:
                os.close(file)
        except OSError as full:
            raise UserError(
                f"cannot record the unreadable image {error.name} in {self.journal}: "
                f"{full.strerror}; set TMPDIR to a folder with space"
            ) from full

    def collect(self) -> dict[str, str]:
        """Returns reasons by name, of all processes of the run, each of which must call."""
        self.found |= _read(self.journal)
        if distributed.is_available() and distributed.is_initialized():
            everyone: list[dict[str, str]] = [{}] * distributed.get_world_size()
            distributed.all_gather_object(everyone, self.found)
            for found in everyone:
                self.found |= found
        return self.found

    def report(self, folder: Path | None) -> dict[str, int]:
        """Brings the list of the run folder up to date; every process of the run must call.

        What an earlier part of the run listed stays. Called before a state is saved, the list is
        complete after any interruption: what was read since is read again.

        Args:
            folder: The run folder, in the one process that writes; None in the others.

        Returns:
            Columns of the epoch's row: ``bad_images``, the number in the list, unless unreadable
            images are errors.
        """
        if not self.skip:
            return {}
        found = self.collect()
        if folder is not None:
            found |= _read(folder / BAD_IMAGES)
            if found:
                lines = (_line(name, why) for name, why in sorted(found.items()))
                write_text(folder / BAD_IMAGES, "".join(lines))
        return {"bad_images": len(found)}


def too_many(name: str) -> UserError:
    """Returns the error for `LIMIT` unreadable images in a row."""
    return UserError(
        f"{LIMIT} images in a row cannot be read, the last of them {name}: "
        "is the disk or network share still there? `vitlinear check-data` lists them all"
    )


def _line(name: str, reason: str) -> str:
    return f"{name}\t{reason}\n"


def _read(path: Path) -> dict[str, str]:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    return dict(_pairs(text.split("\n")))


def _pairs(lines: Iterable[str]) -> Iterable[tuple[str, str]]:
    for line in lines:
        name, tab, why = line.partition("\t")
        if tab:
            yield name, why


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a worker is a copy of this process, and ends earlier
        path.unlink(missing_ok=True)
