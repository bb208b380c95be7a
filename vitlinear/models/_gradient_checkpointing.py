"""Gradient checkpointing of blocks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import timm.models
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitlinear.layers.band import rows_in_use, use_rows
from vitlinear.layers.moved_buffers import moved_buffers

from ._valid_region import use_valid_region, valid_region


class Block(nn.Module):
    """A block of a backbone, of which backward can compute the activations again.

    Attributes:
        grad_checkpointing: Whether it does; see `TimmBackbone.set_grad_checkpointing`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    # Not in `forward`: that is what TorchScript compiles, which cannot recompute.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run `forward` and the hooks, as any module does."""
        if self.grad_checkpointing:
            return _checkpoint(self, super().__call__, *args, **kwargs)
        return super().__call__(*args, **kwargs)


def _checkpoint(block: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """timm's `checkpoint` of ``run``, the call of a block, as if it ran once.

    The backward pass recomputes under the valid region and the rows of this forward pass. It comes
    when these are no longer in use, perhaps after a forward pass under others, and on a GPU in a
    thread of its own. Batch norms count the images of a batch once, and what other modules move in
    training (their attribute ``moves_in_training`` names the buffers) is for backward where it was.
    """
    if torch.compiler.is_compiling():  # nothing runs twice: the compiler has its own recomputation
        return timm.models.checkpoint(run, *args, **kwargs)
    region, rows, again = valid_region(), rows_in_use(), False
    moving: list[tuple[Any, str, torch.Tensor]] = [
        (module, name, buffer.clone())
        for module in block.modules()
        if module.training
        for name, buffer in moved_buffers(module)
    ]

    def run_in_region(*args: Any, **kwargs: Any) -> Any:
        nonlocal again
        statistics = _buffers_of_recomputation(block, moving) if again else nullcontext()
        with use_valid_region(region), use_rows(rows), statistics:
            again = True
            return run(*args, **kwargs)

    return timm.models.checkpoint(run_in_region, *args, **kwargs)


@contextmanager
def _buffers_of_recomputation(
    block: nn.Module, moving: list[tuple[Any, str, torch.Tensor]]
) -> Iterator[None]:
    """Inside, batch norms in training mode count into copies of their averages.

    Not by switching those off, without which another number of tensors would be kept.

    Args:
        block: Whose batch norms.
        moving: Modules, their buffers that move in training, and where these were.
    """
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.training]
    copies = [(norm, name, x) for norm in norms for name, x in norm.named_buffers(recurse=False)]
    copies += moving
    present = [(module, name, module.get_buffer(name)) for module, name, _ in copies]
    for module, name, x in copies:
        setattr(module, name, x.clone())
    for module, _, _ in moving:
        module.recomputed_as_it_was = True
    try:
        yield
    finally:
        for module, name, x in present:
            setattr(module, name, x)
        for module, _, _ in moving:
            module.recomputed_as_it_was = False
