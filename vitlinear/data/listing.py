"""The one listing of images: the files of a folder that every command reads."""

import functools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vitlinear.errors import UserError

# Formats that Pillow knows and does not decode itself: it identifies them, hands them to a plug-in
# of another library, or starts Ghostscript.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
HIDDEN, LINKED, SPECIAL = "hidden", "linked once more", "special"
SHOWN = 8  # kinds of what is left out, in a note
IMAGES = "no images (.jpg, .png, .tif, .webp and whatever else Pillow reads)"


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Returns the suffixes, in small letters, of the formats that this Pillow decodes."""
    Image.init()
    suffixes = Image.registered_extensions().items()
    return frozenset(
        suffix
        for suffix, kind in suffixes
        if kind in (*Image.OPEN, "MPO") and kind not in NOT_DECODED  # MPO is opened as JPEG
    )


def reason_left_out(name: str) -> str | None:
    """Returns why a file is left out, None if it is not, or "" where that needs no word.

    Args:
        name: Of the file, without its folder.
    """
    suffix = os.path.splitext(name)[1].lower()
    if name.startswith("."):
        return HIDDEN if suffix in image_suffixes() else ""
    if suffix in image_suffixes():
        return None
    return suffix or "without suffix"


def natural_order(name: str) -> tuple[Any, ...]:
    """Returns a key without ties that sorts ``a2`` before ``a10`` and ``A`` beside ``a``."""
    parts = re.split(r"(\d+)", name.lower())
    return tuple(int(part) if place % 2 else part for place, part in enumerate(parts)), name


def entries_of(folder: str) -> list[os.DirEntry[str]]:
    """Returns the entries of a folder, by name.

    Raises:
        UserError: The folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read folder {folder}: {error.strerror}") from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def images_below(folder: str, left_out: Counter[str], seen: set[str]) -> Iterator[str]:
    """Yields the image files of a folder and of all below it, in no particular order.

    Hidden files and folders are left out. Links are followed; no folder is read twice, so a link to
    a folder above ends there. A link that leads nowhere counts as a file, which cannot be read.

    Args:
        folder: Where to begin.
        left_out: Gets the number of what is left out, by reason.
        seen: Real paths of the folders that are not to be read (again); grows.
    """
    seen.add(os.path.realpath(folder))
    folders, links = [folder], list[str]()
    while folders or links:
        # Links come last: a folder is found where it lies.
        here = folders.pop() if folders else links.pop(0)
        if here != folder:
            real = os.path.realpath(here)
            if real in seen:
                left_out[LINKED] += 1
                continue
            seen.add(real)
        for entry in entries_of(here):
            if is_folder(entry):
                if entry.name.startswith("."):
                    left_out[HIDDEN] += 1
                else:
                    (links if entry.is_symlink() else folders).append(entry.path)
                continue
            reason = reason_left_out(entry.name)
            if reason is None and not _is_file(entry):
                reason = SPECIAL
            if reason is None:
                yield entry.path
            elif reason:
                left_out[reason] += 1


def _is_file(entry: os.DirEntry[str]) -> bool:
    if not entry.is_symlink():
        return entry.is_file()
    return os.path.isfile(entry.path) or not os.path.exists(entry.path)


def told_left_out(left_out: Counter[str]) -> str:
    """Returns what a listing left out, in words; empty if that is nothing."""
    if not left_out:
        return ""
    pairs = sorted(left_out.items(), key=lambda pair: (-pair[1], pair[0]))
    kinds = [f"{count} {reason}" for reason, count in pairs]
    more = ["..."] if len(kinds) > SHOWN else []
    return f"left out {', '.join(kinds[:SHOWN] + more)}"


def no_images(kind: str, where: str | Path, left_out: Counter[str], advice: str) -> UserError:
    """Returns the error for a folder without images, which says what else it holds."""
    told = told_left_out(left_out)
    held = f" ({told})" if told else ""
    return UserError(f"{kind} {where} holds {IMAGES}{held}: {advice}")


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Returns the files meant by ``inputs``: themselves, and the images below folders, in order.

    What is left out of a folder is told on standard error.

    Raises:
        UserError: An input does not exist, or a folder holds no images.
    """
    found: list[Path] = []
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            left_out: Counter[str] = Counter()
            below = sorted(images_below(str(path), left_out, set()), key=natural_order)
            if not below:
                raise no_images("folder", path, left_out, "give another, or name the files")
            if told := told_left_out(left_out):
                print(f"{path}: {told}", file=sys.stderr)
            found += map(Path, below)
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"image {path} does not exist")
    return found
