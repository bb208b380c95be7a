"""The one way from a checkpoint, whoever wrote it, to a state dict that fits a model."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from timm.layers import RelPosBias, resample_abs_pos_embed, resize_rel_pos_bias_table_simple
from torch import Tensor, nn

from .mappings import find_mapping
from .unwrap import unwrap_state_dict


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring a checkpoint into our keys: ours unchanged, the authors' translated.

    Learned positions of another grid are resized; see `resize_positions` and `resize_tables`.

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
    if mapping is not None:
        weights = mapping.convert(weights, model.state_dict())
    return resize_tables(resize_positions(weights, model), model)


def resize_tables(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resize positions of maps, and of windows, to a model made for other ones.

    Args:
        weights: In our keys.
        model: The model to load into.

    Returns:
        The weights, with other ``pos_embed`` for modules that have one and a ``grid_size``, and
        other ``relative_position_bias_table`` for windows of another size. Those of the
        checkpoint are taken to be square.
    """
    resized = {}
    for name, module in model.named_modules():
        if isinstance(module, RelPosBias):
            key = f"{name}.relative_position_bias_table"
            table, target = weights.get(key), module.relative_position_bias_table
            if table is not None and table.shape[0] != target.shape[0]:
                height, width = module.window_size
                resized[key] = resize_rel_pos_bias_table_simple(
                    table, (height, width), tuple(target.shape)
                )
        elif hasattr(module, "pos_embed") and hasattr(module, "grid_size"):
            key = f"{name}.pos_embed"
            table = weights.get(key)
            if table is not None and table.shape[1] != module.pos_embed.shape[1]:
                resized[key] = resample_abs_pos_embed(
                    table,
                    new_size=list(module.grid_size),
                    num_prefix_tokens=0,
                    interpolation="bilinear",  # as the model does it
                    antialias=False,
                )
    return {**weights, **resized}


def resize_positions(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resize learned positions of a row of tokens to the grid of a model made for another size.

    Args:
        weights: In our keys, or of a model without such positions.
        model: The model to load into.

    Returns:
        The weights, with other positions if the model has ``pos_embed`` and ``patch_embed`` and
        those of the checkpoint come from another, square grid.
    """
    target, positions = getattr(model, "pos_embed", None), weights.get("pos_embed")
    patch_embed = getattr(model, "patch_embed", None)
    if target is None or positions is None or patch_embed is None or positions.dim() != 3:
        return weights
    prefix = getattr(model, "num_prefix_tokens", 0)
    side = isqrt(max(positions.shape[1] - prefix, 0))
    # Any other shape is for load_state_dict to report.
    fits = positions.shape[1] == target.shape[1] or prefix + side * side != positions.shape[1]
    if fits or positions.shape[2] != target.shape[2]:
        return weights
    resized = resample_abs_pos_embed(
        positions,
        new_size=list(patch_embed.grid_size),
        old_size=[side, side],
        num_prefix_tokens=prefix,
    )
    return {**weights, "pos_embed": resized}
