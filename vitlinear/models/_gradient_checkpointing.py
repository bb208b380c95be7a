"""Gradient checkpointing of blocks."""

from collections.abc import Callable
from typing import Any

import timm.models
import torch
from torch import nn

from ._valid_region import ValidRegion, use_valid_region, valid_region


class Block(nn.Module):
    """A block of a backbone, of which backward can compute the activations again.

    Attributes:
        grad_checkpointing: Whether it does; see `TimmBackbone.set_grad_checkpointing`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    # Not in `forward`: that is what TorchScript compiles, which cannot recompute.
    def __call__(self, *args: Any) -> Any:
        """Run `forward` and the hooks, as any module does."""
        if self.grad_checkpointing:
            return _checkpoint(super().__call__, *args)
        return super().__call__(*args)


def _checkpoint(block: Callable[..., Any], *args: Any) -> Any:
    """timm's `checkpoint`, recomputing under the valid region of this forward pass.

    The backward pass comes when the region is no longer in use, perhaps after a forward pass under
    another one, and on a GPU in a thread of its own.
    """
    if torch.compiler.is_compiling():  # nothing runs twice: the compiler has its own recomputation
        return timm.models.checkpoint(block, *args)
    return timm.models.checkpoint(_run, valid_region(), block, *args)


def _run(region: ValidRegion | None, block: Callable[..., Any], *args: Any) -> Any:
    with use_valid_region(region):
        return block(*args)
