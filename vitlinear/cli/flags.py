"""Values of flags: the numbers that they take, and typed configurations made of parsed ones.

A configuration is a frozen dataclass beside what it configures. Its fields have the names of the
flags, and the function that adds these flags to a parser stands below it.
"""

import argparse
import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

Configuration = TypeVar("Configuration")


def _at_least(low: float, kind: type) -> "type":
    """Returns an argparse type: ``kind``, refused below ``low``."""

    def convert(text: str) -> float:
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"must be at least {low:g}, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse prints it: "invalid int value: 'x'"
    return convert  # type: ignore[return-value]


COUNT = _at_least(1, int)
NATURAL = _at_least(0, int)
RATE = _at_least(0.0, float)
POSITIVE = _at_least(1e-6, float)


def path(text: str) -> Path:
    """Returns the path that a flag names, ``~`` replaced; an argparse type."""
    return Path(text).expanduser()


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
