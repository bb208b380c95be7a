"""Values of flags: the numbers that they take, and typed configurations made of parsed ones.

A configuration is a frozen dataclass beside what it configures. Its fields have the names of the
flags, and the function that adds these flags to a parser stands below it.
"""

import argparse
import dataclasses
import math
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

Configuration = TypeVar("Configuration")


def _number(
    kind: type, low: float = -math.inf, high: float = math.inf, below: float = math.inf
) -> "type":
    """Returns an argparse type: finite numbers from ``low`` to ``high``, and below ``below``."""

    def convert(text: str) -> float:
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"must be at least {low:g}, got {text}")
        if value > high:
            raise argparse.ArgumentTypeError(f"must be at most {high:.10g}, got {text}")
        if value >= below:
            bound = f"below {below:g}" if math.isfinite(below) else "finite"
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse prints it: "invalid int value: 'x'"
    return convert  # type: ignore[return-value]


COUNT = _number(int, 1)
NATURAL = _number(int, 0)
SEED = _number(int, 0, 2**32 - 1)  # what numpy takes
REAL = _number(float)
RATE = _number(float, 0)
POSITIVE = _number(float, 1e-6)
PROBABILITY = _number(float, 0, 1)
SHARE = _number(float, 0, below=1)


def path(text: str) -> Path:
    """Returns the path that a flag names, ``~`` replaced; an argparse type."""
    return Path(text).expanduser()


def file_name(text: str) -> str:
    """Returns the same as text, for a field that is one; an empty one stays empty."""
    return os.path.expanduser(text)


def from_arguments(kind: type[Configuration], args: argparse.Namespace) -> Configuration:
    """Returns a configuration with the values of the flags that its fields are named after.

    Args:
        kind: A dataclass. A field that is a dataclass itself is filled likewise.
        args: Parsed flags. Lists become tuples.

    Raises:
        AttributeError: A field is named after no flag.
    """
    types = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(part := types[field.name]):
            values[field.name] = from_arguments(part, args)  # type: ignore[arg-type]
        else:
            value = getattr(args, field.name)
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def values_by_flag(config: Any) -> Mapping[str, Any]:
    """Returns every value of a configuration, those of its parts among them, by field name."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values.update(
            values_by_flag(value) if dataclasses.is_dataclass(value) else {field.name: value}
        )
    return values
