"""From whatever a training script saved to a bare state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import clean_state_dict
from torch import Tensor

# Where training scripts put the weights, best first: averaged weights are what they evaluate.
WRAPPERS = ("model_ema", "state_dict_ema", "model", "state_dict", "module")


def _find(checkpoint: Mapping[str, Any]) -> dict[str, Tensor] | None:
    for key in WRAPPERS:
        # A wrapper may hold the state of an averager, say, and no weights: then on to the next.
        if isinstance(inner := checkpoint.get(key), Mapping) and (found := _find(inner)):
            return found
    tensors = {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)}
    return tensors if any(v.ndim and v.is_floating_point() for v in tensors.values()) else None


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Find the weights in a checkpoint.

    Takes a bare state dict or one under ``model_ema``, ``state_dict_ema``, ``model``,
    ``state_dict`` or ``module``, with or without the ``module.`` prefix of DistributedDataParallel.

    Raises:
        ValueError: No tensors are found.
    """
    state_dict = _find(checkpoint)
    if state_dict is None:
        found = ", ".join(map(str, list(checkpoint)[:8])) or "nothing"
        raise ValueError(
            f"no weights in this checkpoint: expected tensors, bare or under one of "
            f"{', '.join(WRAPPERS)}; found {found}"
        )
    return clean_state_dict(state_dict)
