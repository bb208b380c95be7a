"""Buffers that a forward pass in training changes, of modules that name them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def moved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the buffers of a module itself that its ``moves_in_training`` names, by name.

    A wrapper that passes attributes on shows the names of the module inside, and holds no buffers.
    """
    for name in getattr(module, "moves_in_training", ()):
        if (buffer := module._buffers.get(name)) is not None:
            yield name, buffer
