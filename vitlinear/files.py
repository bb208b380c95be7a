"""Files that appear whole or not at all, and that take no other file's place.

Every file is written under a temporary name, flushed to the disk and renamed, so that under its own
name there is only ever a whole one. Links stay, and what they lead to is replaced. Devices, pipes
and the streams of the process cannot be replaced: the finished file is copied into them.
"""

import contextlib
import errno
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from vitlinear.errors import UserError, one_line


def write_atomically(path: Path, write: Callable[[Path], object], keep: Path | None = None) -> None:
    """Calls ``write`` on a temporary neighbour of ``path``, syncs it and renames it to ``path``.

    Args:
        path: The file.
        write: Writes the file that it is given.
        keep: New name of the file that is replaced.

    Raises:
        UserError: The file cannot be written; the one that was there is.
    """
    # A file that is kept under another name leaves with its link.
    place = path if keep is not None else Path(os.path.realpath(path))
    temporary = place.with_name(f".{place.name}.tmp")
    earlier = "; what was there before is kept"
    try:
        if path.exists():
            stream = _stream(path)
            if stream is not None or not path.is_file():
                earlier = ""
                _copy_into(path if stream is None else stream, write)
                return
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if keep is not None and place.exists():
            os.replace(place, keep)
        os.replace(temporary, place)
        earlier = ""
        if os.name == "posix":  # the rename itself survives a power cut once its folder is synced
            _sync_folder(place.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        refused = _os_error(error)
        if refused is not None:
            kept = earlier if os.path.exists(place) else ""
            raise UserError(f"cannot write {path}: {refused.strerror or refused}{kept}") from error
        raise


def _stream(path: Path) -> int | None:
    """Returns the descriptor of standard output or errors if a path leads to one of them."""
    found = path.stat()
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # it may be closed
            if os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
    return None


def _copy_into(target: Path | int, write: Callable[[Path], object]) -> None:
    """Writes an ordinary file, since not all writers can do without a position, and copies it.

    Args:
        target: What it is copied into; of a stream, its descriptor.
        write: Writes the file that it is given.
    """
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "file"
        write(temporary)
        stream = isinstance(target, int)
        if stream:
            # Opened anew, a stream that goes to a file would begin at its start.
            sys.stdout.flush()
            sys.stderr.flush()
        with temporary.open("rb") as source, open(target, "wb", closefd=not stream) as opened:
            shutil.copyfileobj(source, opened)


def _sync_folder(folder: Path) -> None:
    # Some file systems cannot do this, and a folder may be closed to readers; the file is whole.
    cannot = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS, errno.EACCES)
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in cannot:
            raise


def _os_error(error: BaseException | None) -> OSError | None:
    """Returns the system's refusal behind an error: torch.save wraps it in one of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def check_parent(path: str | None, inputs: Iterable[str | Path | None] = ()) -> None:
    """Raises `UserError` if a file that is to hold results has no folder to go to, or is an input.

    Args:
        path: The file; None if none is asked for.
        inputs: Files that the command reads.
    """
    if path:
        file = Path(path).expanduser()
        target = Path(os.path.realpath(file))  # of links, and without the `..` of missing folders
        if not (file.parent.is_dir() and target.parent.is_dir()):
            raise UserError(f"cannot write {path}: its folder does not exist")
        check_no_input(path, inputs)


def check_new_file(
    path: str | Path, overwrite: bool, inputs: Iterable[str | Path | None] = ()
) -> None:
    """Raises `UserError` if a file of this name cannot be, or replaces an input, or one unasked.

    Args:
        path: The file.
        overwrite: Whether it may replace one that is no input.
        inputs: Files that the command reads.
    """
    check_no_input(path, inputs)
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    if file.exists() and not overwrite:
        raise UserError(f"{path} exists: give another name, or --overwrite")
    check_parent(str(path))


def check_no_input(path: str | Path, inputs: Iterable[str | Path | None]) -> None:
    """Raises `UserError` if a file that is to be written is one that the command reads."""
    if _names(Path(path).expanduser()) & {name for file in inputs if file for name in _names(file)}:
        raise UserError(f"cannot write {path}: the command reads it; give another name")


def check_apart(files: Mapping[str, str | Path | None]) -> None:
    """Raises `UserError` if two files that a command is to write are one.

    Devices and pipes may be: the second result replaces nothing there.

    Args:
        files: The file of each flag; None or empty for none.
    """
    taken: dict[str, str] = {}
    for flag, given in files.items():
        file = Path(given).expanduser() if given else None
        if file is None or (file.exists() and not file.is_file()):
            continue
        for name in _names(file):
            if taken.setdefault(name, flag) != flag:
                raise UserError(f"{taken[name]} and {flag} are both {given}: give each its own")


def check_results(
    files: Mapping[str, str | Path | None], inputs: Iterable[str | Path | None] = ()
) -> None:
    """Raises `UserError` if a command cannot write its files, each in a place of its own.

    Files that are there will be replaced, but for those that the command reads.

    Args:
        files: The file of each flag; None or empty for none.
        inputs: Files that the command reads.
    """
    inputs = list(inputs)
    for file in files.values():
        if file:
            check_new_file(file, True, inputs)
    check_apart(files)


def check_no_input_folder(folder: Path, inputs: Iterable[Path]) -> None:
    """Raises `UserError` if a folder for results is, or lies in, one that images are read from.

    Args:
        folder: For the results.
        inputs: Folders that the command reads.
    """
    for parent in inputs:
        if folder.expanduser().resolve().is_relative_to(parent.expanduser().resolve()):
            raise UserError(
                f"cannot write to {folder}: images are read from {parent}, and the next run would "
                "take results for images; give a folder outside of it"
            )


def make_folder(folder: Path) -> None:
    """Makes a folder for results, and those above it, if they are not there.

    Raises:
        UserError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {one_line(error)}") from error


class ResultPaths:
    """Paths for what a command makes of files: each is new, and none is an input's.

    Args:
        inputs: Files that the command reads.
        overwrite: Hand out paths of files that were there before, too, unless they are inputs.
    """

    def __init__(self, inputs: Iterable[str | Path], overwrite: bool = False) -> None:
        self._taken = {name for file in inputs for name in _names(file)}
        self._overwrite = overwrite
        self._tried: dict[tuple[Path, str], int] = {}

    def take(self, folder: Path, stem: str, endings: Iterable[str]) -> list[Path]:
        """Returns a path for each ending, ``-2``, ``-3``, ... behind the stem if one is not free.

        Args:
            folder: Where they are to lie.
            stem: Their name without the ending, such as that of the image.
            endings: Such as ``.png`` and ``_labels.png``.
        """
        endings = tuple(endings)
        key = folder, stem.casefold()
        for number in itertools.count(self._tried.get(key, 0) + 1):
            name = stem if number == 1 else f"{stem}-{number}"
            paths = [folder / f"{name}{ending}" for ending in endings]
            if all(self._is_free(path) for path in paths):
                break
        self._tried[key] = number
        self._taken.update(name for path in paths for name in _names(path))
        return paths

    def _is_free(self, path: Path) -> bool:
        return not (_names(path) & self._taken) and (self._overwrite or not os.path.lexists(path))


def _names(path: str | Path) -> set[str]:
    """A file's place, and that which links lead to; some file systems know no capitals."""
    return {os.path.abspath(path).casefold(), os.path.realpath(path).casefold()}


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
