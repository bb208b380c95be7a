"""The one way from a checkpoint, whoever wrote it, to a state dict that fits a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .mappings import find_mapping
from .unwrap import unwrap_state_dict


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring a checkpoint into our keys: ours unchanged, the authors' translated.

    Args:
        state_dict: Bare weights or a training checkpoint that holds them; see `unwrap_state_dict`.
        model: The model to load into; gives the shapes.

    Returns:
        A state dict for `model.load_state_dict`.

    Raises:
        ValueError: There are no weights in the checkpoint.
    """
    weights = unwrap_state_dict(state_dict)
    mapping = find_mapping(weights)
    return weights if mapping is None else mapping.convert(weights, model.state_dict())
