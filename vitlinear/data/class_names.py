"""The class names of a data set, in the order of their labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data.readers.class_map import load_class_map

from vitlinear.errors import UserError, one_line

from .sources import OPENING


def names_in_order(table: dict[Any, int] | None) -> list[str] | None:
    """Returns class names by label, or None if the labels are not 0, 1, 2, ..."""
    if not table or sorted(table.values()) != list(range(len(table))):
        return None
    return [str(name) for name in sorted(table, key=table.__getitem__)]


def read_class_map(path: str, root: str = "") -> dict[Any, int]:
    """Reads the labels of class names from a ``--class-map``: a name a line, or a pickled dict.

    Args:
        path: The file, ``.txt`` or ``.pkl``.
        root: Where it lies if ``path`` is nothing by itself.

    Raises:
        UserError: A line is empty, or a name is there twice.
    """
    table = load_class_map(path, root)
    if not path.lower().endswith(".txt"):
        return table
    file = Path(path) if Path(path).exists() else Path(root, path)
    names = [line.strip() for line in file.read_text(encoding="utf-8").rstrip().split("\n")]
    for number, name in enumerate(names):
        if not name:
            raise UserError(f"--class-map {path} has an empty line {number + 1}")
        if name in names[:number]:
            raise UserError(f"--class-map {path} names {name} twice")
    return {name: number for number, name in enumerate(names)}


def class_list(path: str) -> list[str]:
    """Reads the class names of a ``--class-map`` for data whose labels are numbers already."""
    try:
        names = names_in_order(read_class_map(path))
    except OPENING as error:
        raise UserError(f"cannot read --class-map {path}: {one_line(error)}") from error
    if names is None:
        raise UserError(f"--class-map {path} does not number its classes 0, 1, 2, ...")
    return names


def classes_of(dataset: Any) -> list[str] | None:
    """Returns the class names in label order, or None where the data does not say."""
    return getattr(dataset, "classes", None)


def check_same_classes(
    expected: Sequence[str] | None, found: Sequence[str] | None, first: str, second: str
) -> None:
    """Raises `UserError` if two lists of class names, where both are known, differ."""
    if expected is None or found is None or list(expected) == list(found):
        return
    counts = f"{first} has {len(expected)} classes, {second} {len(found)}"
    differ = f"the classes of {first} and {second} differ"
    raise UserError(
        f"{differ if len(expected) == len(found) else counts}: {_difference(expected, found)}; "
        "--class-map FILE names all classes of folders"
    )


def _difference(expected: Sequence[str], found: Sequence[str]) -> str:
    odd = sorted(set(expected) ^ set(found))[:3]
    return f"not in both: {', '.join(odd)}" if odd else "same names in another order"
