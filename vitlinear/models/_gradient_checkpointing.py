"""Gradient checkpointing of blocks."""

from typing import Any

import timm.models
import torch
from torch import nn

from ._valid_region import ValidRegion, use_valid_region, valid_region


def checkpoint(block: nn.Module, *args: Any) -> Any:
    """timm's `checkpoint`, recomputing under the valid region of this forward pass.

    The backward pass comes when the region is no longer in use, perhaps after a forward pass under
    another one, and on a GPU in a thread of its own.
    """
    if torch.compiler.is_compiling():  # nothing runs twice: the compiler has its own recomputation
        return timm.models.checkpoint(block, *args)
    return timm.models.checkpoint(_run, valid_region(), block, *args)


def _run(region: ValidRegion | None, block: nn.Module, *args: Any) -> Any:
    with use_valid_region(region):
        return block(*args)
