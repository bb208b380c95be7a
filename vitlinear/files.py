"""Files that appear whole or not at all.

Every file is written under a temporary name, flushed to the disk and renamed, so that under its own
name there is only ever a whole one.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from vitlinear.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], object], keep: Path | None = None) -> None:
    """Calls ``write`` on a temporary neighbour of ``path``, syncs it and renames it to ``path``.

    Args:
        path: The file.
        write: Writes the file that it is given.
        keep: New name of the file that is replaced.

    Raises:
        UserError: The file cannot be written; the one that was there is.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        refused = _os_error(error)
        if refused is not None:
            earlier = "; what was there before is kept" if path.exists() else ""
            raise UserError(
                f"cannot write {path}: {refused.strerror or refused}{earlier}"
            ) from error
        raise
    if os.name == "posix":  # the rename itself survives a power cut once its folder is synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _os_error(error: BaseException | None) -> OSError | None:
    """Returns the system's refusal behind an error: torch.save wraps it in one of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def check_parent(path: str | None) -> None:
    """Raises `UserError` if a file that is to hold results has no folder to go to."""
    if path and not Path(path).expanduser().parent.is_dir():
        raise UserError(f"cannot write {path}: its folder does not exist")


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
