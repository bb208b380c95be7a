"""How many rows of a step fit into memory: measured on small bands, then extrapolated."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitlinear.errors import UserError

# What libraries take for themselves inside of one operation is not seen, nor the rests that the
# allocator keeps.
MARGIN = 1.5
RESERVE = 64 * 2**20  # bytes that libraries take when they first run
FEW_ROWS, MANY_ROWS = 2, 10  # of the bands that are measured
COLUMNS = 56  # of the maps of these bands: whole windows of 7, 8 and 14 columns

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_memory(memory: int | str) -> int:
    """Bytes of a number, or of a text such as ``4GiB`` or ``500MB`` (both count in 1024).

    Raises:
        UserError: It is no amount of memory.
    """
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?)(?:i?B)?\s*", memory, re.IGNORECASE)
        if not found:
            raise UserError(f"memory {memory!r} is no amount such as 4GiB or 500MiB")
        memory = int(float(found[1]) * _UNITS[found[2].upper()])
    if memory <= 0:
        raise UserError(f"memory must be more than 0, got {memory}")
    return memory


def amount(size: int) -> str:
    """Bytes in words."""
    size = max(size, 0)
    unit, factor = next((u, f) for u, f in reversed(_UNITS.items()) if size >= f or f == 1)
    return f"{size / factor:.3g} {unit}iB" if unit else f"{size} bytes"


def resident() -> int:
    """Bytes that this process holds in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def give_back_memory() -> None:
    """Let the allocator of C return to the system what it keeps, where it can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class _Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, each memory once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.layout is torch.strided:
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._seen:
            return
        self._seen.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, place, size)

    def _free(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors that are alive at once while something runs."""
    with _Peak() as count:
        run()
    return count.peak


def measured_bytes(measure: Callable[[int, int], int], height: int, width: int) -> tuple[int, int]:
    """Bytes that a band of no row takes, and those of each row, with a margin.

    They are measured on small bands: what a band takes grows by the row and by the column.

    Args:
        measure: Bytes for a band of some own rows, in a map of some columns.
        height: Rows of the map.
        width: Columns of the map.
    """
    few, many = min(FEW_ROWS, height), min(MANY_ROWS, height)
    narrow, wide = min(COLUMNS, width), min(2 * COLUMNS, width)
    low = measure(few, narrow)
    per_row = low / few if many == few else (measure(many, narrow) - low) / (many - few)
    # Copies of weights depend on neither.
    fixed = 0.0
    if wide > narrow:
        fixed = max(low - (measure(few, wide) - low) / (wide - narrow) * narrow, 0.0)
    base = max(low - fixed - few * per_row, 0.0)
    factor = MARGIN * width / narrow
    return int(MARGIN * fixed + factor * base), max(int(factor * per_row), 1)


def rows_that_fit(base: int, per_row: int, height: int, budget: int, name: str) -> int:
    """The height of bands of a step.

    Args:
        base: As `measured_bytes` gives it.
        per_row: Likewise.
        height: Rows of the map.
        budget: Bytes that there are.
        name: Of the step, for the message.

    Raises:
        UserError: Not even one row fits.
    """
    if base + per_row > budget:
        raise _too_little(name, base + per_row, budget)
    return min((budget - base) // per_row, height)


def _too_little(name: str, needed: int, budget: int) -> UserError:
    return UserError(
        f"{name} needs {amount(needed)} for its smallest band, and {amount(budget)} are left of "
        "the memory that may be used: give more by memory="
    )
