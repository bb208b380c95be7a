"""Scratch memory of a call: many small tensors carved out of one allocation.

A view costs a third of an allocation, and a call has up to ten tensors for its sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # numbers of 4 bytes: tensors begin where separate allocations might


def with_shape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor of a vector that may be longer."""
    entries = prod(shape)
    return (x if x.numel() == entries else x[:entries]).view(shape)


class Layout:
    """Where contiguous float32 tensors of given shapes stand in one allocation."""

    def __init__(self, shapes: Sequence[tuple[int, ...] | None], device: torch.device) -> None:
        """Lay them out one after the other.

        Args:
            shapes: Their shapes; None stays None.
            device: Where they are to be.
        """
        self._shapes = shapes
        entries = [prod(shape) for shape in shapes if shape is not None]
        self._sizes = [-(-size // ALIGNMENT) * ALIGNMENT for size in entries]
        # Of each among those that exist; the last of all for None.
        number = iter(range(len(entries)))
        places = [-1 if shape is None else next(number) for shape in shapes]
        self._pick: Callable[[Any], Any] = itemgetter(*places)
        self._several = len(self._sizes) > 1
        self.size = sum(self._sizes)
        # Memory like a tensor's is had in two thirds of the time that memory of a size takes.
        entry = torch.empty(1, dtype=torch.float32, device=device)
        self._like = entry.expand(self.size)
        self._like_each = [None if shape is None else entry.expand(shape) for shape in shapes]
        # Nobody reads it. Memory that lives on must not be that of a graph which is captured.
        entry.untyped_storage().resize_(0)

    def vectors(self) -> tuple[Tensor | None, ...]:
        """Fresh memory for each, as a vector that may be longer: for who looks at addresses alone.

        They take half the time of tensors that have their shapes.
        """
        memory = torch.empty_like(self._like, memory_format=torch.contiguous_format)
        # "Unsafe" is what autograd does not follow: nobody differentiates these.
        pieces = memory.unsafe_split_with_sizes(self._sizes) if self._several else (memory,)
        return self._pick((*pieces, None))

    def shaped(self, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The tensors of these vectors."""
        return [
            None if x is None or shape is None else with_shape(x, shape)
            for x, shape in zip(vectors, self._shapes, strict=True)
        ]

    def carve(self) -> list[Tensor | None]:
        """Fresh tensors that share one allocation."""
        return self.shaped(self.vectors())

    def separate(self) -> list[Tensor | None]:
        """Fresh tensors, each in an allocation of its own."""
        return [
            None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in self._like_each
        ]
