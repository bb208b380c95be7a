"""Scratch memory of a call: many small tensors carved out of one allocation.

A view costs a third of an allocation, and a call has up to ten tensors for its sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64  # numbers of 4 bytes: tensors begin where separate allocations might


class Layout:
    """Where contiguous float32 tensors of given shapes stand in one allocation."""

    def __init__(self, shapes: Sequence[tuple[int, ...] | None], flat: bool = False) -> None:
        """Lay them out one after the other.

        Args:
            shapes: Their shapes; None stays None.
            flat: Whoever takes them looks at their addresses alone: they may be vectors, which
                take a quarter of the time.
        """
        self._flat = flat
        self._views: list[tuple[tuple[int, ...], tuple[int, ...], int] | None] = []
        self._sizes: list[int] = []
        self.size = 0
        for shape in shapes:
            if shape is None:
                self._views.append(None)
                continue
            strides, entries = [], 1
            for width in reversed(shape):
                strides.append(entries)
                entries *= width
            self._views.append((shape, tuple(reversed(strides)), self.size))
            self._sizes.append(-(-entries // ALIGNMENT) * ALIGNMENT)
            self.size += self._sizes[-1]

    def carve(self, like: Tensor) -> list[Tensor | None]:
        """Fresh tensors that share one allocation, on the device of ``like``."""
        memory = like.new_empty((self.size,), dtype=torch.float32)
        if not self._flat:
            return [None if view is None else memory.as_strided(*view) for view in self._views]
        pieces = iter(memory.split_with_sizes(self._sizes))
        return [None if view is None else next(pieces) for view in self._views]

    def separate(self, like: Tensor) -> list[Tensor | None]:
        """Fresh tensors, each in an allocation of its own."""
        return [
            None if view is None else like.new_empty(view[0], dtype=torch.float32)
            for view in self._views
        ]
