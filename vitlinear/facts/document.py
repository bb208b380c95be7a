"""The two files of this room as they are read: published facts, and what was counted."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

import yaml

FACTS = "facts.yaml"
COUNTS = "counts.json"

# The same loader in C, where PyYAML has it: every `import vitlinear` reads the file.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def document() -> dict[str, dict[str, Any]]:
    """The facts file: an entry for each family, by name; its head says what is in one."""
    result: dict[str, dict[str, Any]] = yaml.load(_read(FACTS), Loader=_Loader)
    return result


@cache
def counts() -> dict[str, dict[str, Any]]:
    """The numbers that `tools/make_cards.py` counted, by model.

    Of each: ``input_size``, ``params``, and ``total``, ``projections``, ``attention`` and
    ``norms`` in multiply-adds; of some, ``agreement``: relative difference from the outputs of the
    authors' code, by input size.
    """
    result: dict[str, dict[str, Any]] = json.loads(_read(COUNTS))
    return result
