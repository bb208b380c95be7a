"""From whatever a training script saved to a bare state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import clean_state_dict
from torch import Tensor

# Where training scripts put the weights, best first: averaged weights are what they evaluate.
# Not ``ema_state_dict``: mmengine exchanges it with ``state_dict``, which has the average then.
WRAPPERS = (
    "model_ema", "state_dict_ema",
    "model", "model_state_dict", "state_dict", "module", "net", "weights",
)  # fmt: skip


def _find(checkpoint: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Tensor]] | None:
    for key in WRAPPERS:
        # A wrapper may hold the state of an averager, say, and no weights: then on to the next.
        if isinstance(inner := checkpoint.get(key), Mapping) and (found := _find(inner)):
            return (key, *found[0]), found[1]
    tensors = {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)}
    usable = any(v.ndim and v.is_floating_point() for v in tensors.values())
    return ((), tensors) if usable else None


def find_weights(checkpoint: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Find the weights in a checkpoint, and where they were.

    Takes a bare state dict or one under a key of `WRAPPERS`, with or without the ``module.`` prefix
    of DistributedDataParallel; also the state of torch's ``AveragedModel``.

    Returns:
        The keys that lead to the weights, none for bare ones, and the weights.

    Raises:
        ValueError: No tensors are found.
    """
    found = _find(checkpoint)
    if found is None:
        keys = ", ".join(map(str, list(checkpoint)[:8])) or "nothing"
        raise ValueError(
            f"no weights in this checkpoint: expected tensors, bare or under one of "
            f"{', '.join(WRAPPERS)}; found {keys}"
        )
    return found[0], clean_state_dict(_without_counters(found[1]))


def _without_counters(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the numbers that an averager, such as torch's `AveragedModel`, has beside a model.

    The model is its ``module``; ``n_averaged`` or ``steps`` stand beside it.
    """
    counters = {
        key
        for key, value in weights.items()
        if "." not in key and value.ndim == 0 and not value.is_floating_point()
    }
    model = {key: value for key, value in weights.items() if key not in counters}
    return model if all(key.startswith("module.") for key in model) else weights


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights alone, as `find_weights` finds them.

    Raises:
        ValueError: No tensors are found.
    """
    return find_weights(checkpoint)[1]
