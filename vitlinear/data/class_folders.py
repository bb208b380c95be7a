"""Labelled image files: the folders directly below a split are the classes, loose or in a tar."""

import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from vitlinear.errors import UserError

from .class_names import names_in_order, read_class_map
from .images import printable
from .listing import (
    HIDDEN,
    entries_of,
    image_suffixes,
    images_below,
    is_folder,
    natural_order,
    no_images,
    reason_left_out,
    told_left_out,
)

TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("validation", "val", "valid", "eval", "evaluation")
NO_CLASS, NOT_NAMED = "in no class folder", "of classes that --class-map does not name"


def split_in(root: Path, split: str) -> Path | None:
    """Returns the sub-folder or tar of a split, by its name or a synonym that timm knows too.

    Args:
        root: Folder of the splits, or a tar that is one.
        split: Its name; empty for a folder of class folders, as ``--val-split ''`` says.
    """
    if not split or root.is_file():
        return root
    for group in (TRAIN_NAMES, HELD_OUT_NAMES):
        names = (split, *group) if split in group else (split,)
        for name in names:
            for path in (root / name, root / f"{name}.tar"):
                if path.exists():
                    return path
    return None


def find_split(root: Path, split: str) -> Path:
    """Returns what `split_in` does, or raises `UserError`."""
    if path := split_in(root, split):
        return path
    wanted = "train" if split in TRAIN_NAMES else split
    raise UserError(
        f"no '{wanted}' folder in {root}: images belong in {root}/train/CLASS/ and "
        f"{root}/val/CLASS/"
    )


class _Labelled:
    """A `Source` of files that lie in folders named as their classes.

    Args:
        where: Folder or tar.
        found: Files by name of the class.
        left_out: Number of what is left out, by reason.
        class_map: File that names the classes in the order of their labels; by default they are
            those that were found, by name. Files of other classes are left out.
        path: Returns the path of a file, by which the files are sorted.
    """

    def __init__(
        self,
        where: Path,
        found: dict[str, list[Any]],
        left_out: Counter[str],
        class_map: str | None,
        path: Callable[[Any], str],
    ) -> None:
        labels = {name: label for label, name in enumerate(sorted(found, key=natural_order))}
        if class_map:
            labels = read_class_map(class_map, str(where))
        samples = []
        for name, files in found.items():
            if name in labels:
                samples += [(file, labels[name]) for file in files]
            else:
                left_out[NOT_NAMED] += len(files)
        if not samples:
            if class_map and not found.keys() & labels:
                shown = ", ".join(sorted(found)[:5])
                raise UserError(
                    f"--class-map {class_map} names no class of {where}, such as {shown}"
                )
            raise no_images("split", where, left_out, "they belong in a folder for each class")
        self.where, self.left_out = where, left_out
        self.samples = sorted(samples, key=lambda sample: natural_order(path(sample[0])))
        self.classes: Sequence[str] | None = names_in_order(labels)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def notes(self) -> list[str]:
        """Lines for the user about what was left out."""
        told = told_left_out(self.left_out)
        return [f"{self.where}: {told}"] if told else []

    @property
    def used_labels(self) -> set[int]:
        """The labels that some file has."""
        return {int(label) for _, label in self.samples}


class ClassFolders(_Labelled):
    """Image files in class folders, at any depth.

    Args:
        root: Folder of the class folders.
        class_map: As in `read_class_map`, or None.

    Raises:
        UserError: There are no class folders, or one of them is another one, or holds no images
            and no class map says that it is a class all the same.
    """

    def __init__(self, root: Path, class_map: str | None = None) -> None:
        left_out: Counter[str] = Counter()
        folders: dict[str, str] = {}  # by real path
        for entry in entries_of(str(root)):
            if entry.name.startswith("."):
                if is_folder(entry) or reason_left_out(entry.name):
                    left_out[HIDDEN] += 1
            elif is_folder(entry):
                real = os.path.realpath(entry.path)
                if real in folders:
                    raise UserError(
                        f"class folders {folders[real]} and {entry.path} are one and the same: "
                        "an image is of one class; remove one of them"
                    )
                folders[real] = entry.path
            elif (reason := reason_left_out(entry.name)) is None:
                left_out[NO_CLASS] += 1
            else:
                left_out[reason] += 1
        if not folders:
            raise UserError(f"no class folders in {root}: images belong in {root}/CLASS/")
        # No link leads from one class into another, or above.
        seen = {os.path.realpath(root), *folders}
        found = {}
        for folder in folders.values():
            inside: Counter[str] = Counter()
            files = list(images_below(folder, inside, seen))
            if not files and not class_map:  # which tells what is a class and what was forgotten
                advice = "add some, remove the folder, or name all classes with --class-map"
                raise no_images("class folder", folder, inside, advice)
            found[printable(os.path.basename(folder))] = files
            left_out += inside
        super().__init__(root, found, left_out, class_map, str)

    def read(self, index: int) -> tuple[bytes, int]:
        """Content of the file, and label."""
        path, label = self.samples[index]
        return Path(path).read_bytes(), int(label)

    def name(self, index: int) -> str:
        """Path of the file."""
        return str(self.samples[index][0])


class Member(NamedTuple):
    """An image in a tar: its name, and where its content lies (bytes)."""

    name: str
    start: int
    size: int


class ClassTar(_Labelled):
    """Image files in the class folders of a tar, which is not compressed.

    A tar inside stands for the folder of its name. Folders above the class folders are passed over
    if they have the name of a split or of the tar itself.

    Args:
        path: The tar.
        class_map: As in `ClassFolders`.

    Raises:
        tarfile.TarError: It is damaged.
        UserError: It holds no images, or members whose names lead out of it.
    """

    def __init__(self, path: Path, class_map: str | None = None) -> None:
        if path.suffix.lower() != ".tar":
            raise UserError(
                f"cannot read {path}: give a folder of class folders, or a .tar, not compressed"
            )
        left_out: Counter[str] = Counter()
        with path.open("rb") as file:
            members = list(_members(path, file, left_out))
        above = _above_classes([member.name for member in members], path.stem)
        found: dict[str, list[Member]] = {}
        for member in members:
            folder, slash, _ = member.name.removeprefix(above).partition("/")
            if slash:
                found.setdefault(printable(folder), []).append(member)
            else:
                left_out[NO_CLASS] += 1
        super().__init__(path, found, left_out, class_map, lambda member: member.name)

    def read(self, index: int) -> tuple[bytes, int]:
        """Content of the member, and label."""
        member, label = self.samples[index]
        with self.where.open("rb") as file:
            file.seek(member.start)
            content = file.read(member.size)
        if len(content) < member.size:
            raise EOFError("the tar is shorter than it was")
        return content, int(label)

    def name(self, index: int) -> str:
        """The tar, and the member in it."""
        return f"{self.where}: {self.samples[index][0].name}"


def _members(
    path: Path, file: IO[bytes], left_out: Counter[str], folder: str = "", start: int = 0
) -> Iterator[Member]:
    """Yields the images of a tar, and of those inside.

    Args:
        path: Of the tar on disk.
        file: The tar, or one inside of it.
        left_out: As in `listing.images_below`.
        folder: What stands before the names.
        start: Where ``file`` begins in the tar on disk.
    """
    known: dict[str, Member] = {}  # hard links come after what they are linked to
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:
            if not (info.isfile() or info.issym() or info.islnk()):
                continue
            parts = [part for part in info.name.split("/") if part not in ("", ".")]
            if ".." in parts:
                raise UserError(
                    f"refusing {path}: the name of its member {printable(info.name)} leads out of "
                    "it; make the tar anew, with names below the class folders"
                )
            name = folder + "/".join(parts)
            if any(part.startswith(".") for part in parts):
                if os.path.splitext(name)[1].lower() in image_suffixes():
                    left_out[HIDDEN] += 1
            elif name.lower().endswith(".tar") and info.isreg():
                inner = archive.extractfile(info)
                assert inner is not None
                begin = start + info.offset_data
                yield from _members(path, inner, left_out, f"{name[:-4]}/", begin)
            elif reason := reason_left_out(parts[-1]):
                left_out[reason] += 1
            elif info.islnk() and info.linkname in known:
                yield known[info.linkname]._replace(name=name)
            elif info.islnk() or info.issym() or info.issparse():
                left_out["linked or sparse"] += 1
            else:
                known[info.name] = Member(name, start + info.offset_data, info.size)
                yield known[info.name]
        # tarfile takes a damaged header for the end
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"damaged at byte {start + archive.offset}")


def _above_classes(names: list[str], stem: str) -> str:
    """Returns the folders above the class folders of a tar, with a slash at the end, or nothing."""
    folders = [name.split("/")[:-1] for name in names]
    common = os.path.commonprefix(folders) if folders else []
    known = {*TRAIN_NAMES, *HELD_OUT_NAMES, "test", stem}
    depth = min(map(len, folders), default=0) - 1  # a class is left
    for place in reversed(range(min(depth, len(common)))):
        if common[place] in known:
            return "/".join(common[: place + 1]) + "/"
    return ""
