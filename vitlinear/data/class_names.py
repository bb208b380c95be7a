"""The class names of a data set, in the order of their labels."""

import pickle
import tarfile
from typing import Any

from timm.data.readers.class_map import load_class_map

from vitlinear.errors import UserError, one_line

# What libraries raise when a data set is not there, not whole, or not what it was said to be.
OPENING = (
    AssertionError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    tarfile.TarError,
)


def names_in_order(table: dict[Any, int] | None) -> list[str] | None:
    """Returns class names by label, or None if the labels are not 0, 1, 2, ..."""
    if not table or sorted(table.values()) != list(range(len(table))):
        return None
    return [str(name) for name in sorted(table, key=table.__getitem__)]


def class_list(path: str) -> list[str]:
    """Reads the class names of a ``--class-map`` for data whose labels are numbers already."""
    try:
        names = names_in_order(load_class_map(path))
    except OPENING as error:
        raise UserError(f"cannot read --class-map {path}: {one_line(error)}") from error
    if names is None:
        raise UserError(f"--class-map {path} does not number its classes 0, 1, 2, ...")
    return names
