"""Block sizes that were measured before: kept in the user's cache, or shipped for this GPU."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .. import gpu, kernel_cache, measurements

ENVIRONMENT_VARIABLE = "VITLINEAR_AUTOTUNE"

# "1" to have block sizes measured, "0" to take none that were. Read once: each call asks.
asked_for = os.environ.get(ENVIRONMENT_VARIABLE)
_noted: dict[str, list[int]] | None = None


def label(key: Any) -> str:
    """A name for a kernel and its plan that does not depend on the device or the process."""
    parts = [part for part in key if not isinstance(part, torch.device)]
    return f"{parts[0]} {hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def find(key: Any) -> list[int] | None:
    """Block of tokens, warps, stages, most registers for a key of `tuning`; None if none is kept.

    ``VITLINEAR_AUTOTUNE=0`` does without.
    """
    device = next((part for part in key if isinstance(part, torch.device)), None)
    if device is None or device.type not in gpu.DEVICES:
        return None
    if asked_for == "0":
        return None
    here, name = gpu.describe(device.index), label(key)
    return kernel_cache.known(here).blocks.get(name) or measurements.seeds(here.name).blocks.get(
        name
    )


def note(key: Any, config: Sequence[int]) -> None:
    """Take down what was measured, where somebody wants to know."""
    if _noted is not None:
        _noted[label(key)] = [*config]


@contextmanager
def measuring() -> Iterator[dict[str, list[int]]]:
    """Have block sizes measured, whatever the environment says; they are noted in the mapping."""
    global _noted, asked_for
    before, earlier = asked_for, _noted
    asked_for, _noted = "1", {}
    try:
        yield _noted
    finally:
        asked_for, _noted = before, earlier
