"""Translation of a checkpoint, whoever wrote it, into a state dict that fits a model."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

from timm.layers import (
    RelPosBias,
    resample_abs_pos_embed,
    resize_rel_pos_bias_table_simple,
    to_2tuple,
)
from torch import Tensor, nn

from vitlinear.errors import Notice
from vitlinear.layers.positions.learned import resized_positions

from .mappings import KeyMapping, find_mapping
from .unwrap import unwrap_state_dict

# Height and width of images in pixels, or both in one.
Size = int | Sequence[int]
# What a detector or segmentor calls its backbone; what `MultiScaleBackbone` calls its model.
BACKBONE, MODEL = "backbone.", "model."
# What `BackboneWithFPN`, for torchvision's detectors, calls the backbone, and what is beside it.
BODY, FPN = "body.", "fpn."
# The norm behind a stage, as RALA and MALA, L2ViT, and `MultiScaleBackbone` call it.
OUTPUT_NORM = re.compile(r"(?:extra_norms\.|norm|norms\.)(\d)\.(?:norm\.)?(weight|bias)")
PYRAMID = "pyramid."
# Learned positions of a map, [1, rows * columns, C], and how the models that have them resize them.
MAP_POSITIONS = {"pos_embed": "bilinear", "positional_encoding": "bicubic"}


def is_detector(weights: Mapping[str, Any]) -> bool:
    """Whether weights look like those of a detector or segmentor, whose backbone is one part."""
    return any(key.startswith(BACKBONE) for key in weights)


def backbone_of(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take the backbone of a detector or segmentor, the authors' or ours, apart.

    Returns:
        Its model, under the keys of a classifier; and what stands behind the model's stages, under
        the keys of `MultiScaleBackbone`.
    """
    model, behind = {}, {}
    for key, value in weights.items():
        if not key.startswith(BACKBONE):
            continue
        key = key.removeprefix(BACKBONE).removeprefix(BODY)
        if key.startswith(FPN):
            continue
        if norm := OUTPUT_NORM.fullmatch(key):
            behind[f"norms.{norm[1]}.{norm[2]}"] = value
        elif key.startswith(PYRAMID):
            behind[key] = value
        else:
            model[key.removeprefix(MODEL)] = value
    return model, behind


def common_prefixes(weights: Mapping[str, Any]) -> list[str]:
    """The beginnings that all keys have in common, the shortest first: ``model.``, ``model.net.``.

    A model of ours has several parts, whose keys have nothing in common.
    """
    parts = os.path.commonprefix(list(weights)).split(".")[:-1]
    return [".".join(parts[: i + 1]) + "." for i in range(len(parts))]


def without(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights whose keys all begin with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in weights.items()}


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Names of a timm model's classifiers: one, none, or several."""
    return _named_parts(model, "classifier")


def first_convolutions(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers of a timm model that see the image: one, none, or several."""
    return _named_parts(model, "first_conv")


def _named_parts(model: nn.Module, key: str) -> tuple[str, ...]:
    names = getattr(model, "pretrained_cfg", {}).get(key) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def wrapper_prefix(weights: Mapping[str, Tensor], model: nn.Module) -> str:
    """The prefix that a program which held the model as a part of its own put before every key.

    Args:
        weights: Bare weights.
        model: The model to load into.

    Returns:
        A prefix such as ``model.`` or ``net._orig_mod.``, without which keys are the model's, or
        those of a detector with it. Empty if they are so as they are, or under no prefix.
    """
    own, prefixes = model.state_dict().keys(), common_prefixes(weights)
    for prefix in ("", *prefixes):
        if own.isdisjoint(rename(without(prefix, weights), model)):
            continue
        # A whole classifier under `backbone.` is no detector, whose backbone has no classifier.
        whole = f"{prefix}{BACKBONE}"
        if whole in prefixes and has_classifier(without(whole, weights), model):
            return whole
        return prefix
    return ""


def has_classifier(weights: Mapping[str, Tensor], model: nn.Module) -> bool:
    """Whether a classifier of the model is among bare weights of any known layout."""
    renamed = rename(weights, model)
    return any(f"{name}.weight" in renamed for name in classifiers(model))


def layout_of(weights: Mapping[str, Tensor]) -> KeyMapping | None:
    """The authors' layout of weights, or of a detector's backbone; see `find_mapping`."""
    return find_mapping(backbone_of(weights)[0] if is_detector(weights) else weights)


def rename(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Bring bare weights into our keys, as far as they are known; of a detector, its stages."""
    if is_detector(weights):
        weights, _ = backbone_of(weights)
    mapping = find_mapping(weights)
    return mapping.convert(weights, model.state_dict()) if mapping else dict(weights)


def resize(
    weights: dict[str, Tensor], model: nn.Module, img_size: Size | None = None
) -> dict[str, Tensor]:
    """Resize learned positions to the model's grids; see the two functions that this calls."""
    return resize_tables(resize_positions(weights, model, img_size), model, img_size)


def checkpoint_filter_fn(
    state_dict: Mapping[str, Any], model: nn.Module, img_size: Size | None = None
) -> dict[str, Tensor]:
    """Bring a checkpoint into our keys: ours unchanged, the authors' translated.

    Of a detector or segmentor (``backbone.*``), the stages alone. What a wrapper has put before
    every key is taken off, with a `Notice`; see `wrapper_prefix`. Learned positions of another grid
    are resized; see `resize_positions` and `resize_tables`.

    Args:
        state_dict: Bare weights or a training checkpoint that holds them; see `unwrap_state_dict`.
        model: The model to load into; gives the shapes.
        img_size: Height and width that the weights were trained at, or both in one; by default as
            timm has noted it.

    Returns:
        A state dict for `model.load_state_dict`.

    Raises:
        ValueError: There are no weights in the checkpoint, or none of this model outside its
            classifier. With ``features_only=True`` timm would take such a file without an error.
    """
    weights = unwrap_state_dict(state_dict)
    if prefix := wrapper_prefix(weights, model):
        weights = without(prefix, weights)
        warnings.warn(
            f"every key of the checkpoint begins with '{prefix}': weights are taken without it",
            Notice,
            stacklevel=2,
        )
    noted = getattr(model, "pretrained_model_args", {}).get("img_size")
    translated = resize(rename(weights, model), model, img_size or noted)
    body = {key for key in model.state_dict() if not key.startswith("head.")}
    if body.isdisjoint(translated):
        raise ValueError(
            f"none of its weights is one of {type(model).__name__}'s; it looks like "
            f"{_what_it_looks_like(weights)}"
        )
    return translated


def _what_it_looks_like(weights: Mapping[str, Tensor]) -> str:
    mapping = find_mapping(weights)
    if is_detector(weights):
        what = "a detector's or segmentor's checkpoint with another backbone"
    elif mapping is not None:
        what = f"the authors' layout '{mapping.name}'"
    else:
        what = "another model's"
    return f"{what} ({len(weights)} tensors: {', '.join(list(weights)[:3])}, ...)"


def resize_tables(
    weights: dict[str, Tensor], model: nn.Module, img_size: Size | None = None
) -> dict[str, Tensor]:
    """Resize positions of maps, and of windows, to a model made for other ones.

    Args:
        weights: In our keys.
        model: The model to load into.
        img_size: That the weights were trained at; see `source_grid`.

    Returns:
        The weights, with other tables for modules that have a ``grid_size`` and one of the names
        in `MAP_POSITIONS`, and other ``relative_position_bias_table`` for windows of another size.
        Windows of the checkpoint are taken to be square.
    """
    resized = {}
    for name, module in model.named_modules():
        if isinstance(module, RelPosBias):
            key = f"{name}.relative_position_bias_table"
            table, target = weights.get(key), module.relative_position_bias_table
            height, width = module.window_size
            offsets = 2 * height - 1, 2 * width - 1
            if table is not None and source_grid(table.shape[0]) not in (None, offsets):
                resized[key] = resize_rel_pos_bias_table_simple(
                    table, (height, width), tuple(target.shape)
                )
            continue
        if not hasattr(module, "grid_size"):
            continue
        for attribute, mode in MAP_POSITIONS.items():
            key = f"{name}.{attribute}"
            table, grid = weights.get(key), module.grid_size
            if table is None or not hasattr(module, attribute):
                continue
            source = source_grid(table.shape[1], img_size)
            if source not in (None, tuple(grid)):
                resized[key] = resized_positions(table, source, *grid, mode).flatten(1, 2)
    return {**weights, **resized}


def source_grid(count: int, img_size: Size | None = None) -> tuple[int, int] | None:
    """Rows and columns of so many positions; None if they cannot be told.

    14 x 56 positions are as many as 28 x 28. So the grid is that of some stride in images of the
    size; where none has as many, or no size is known, a square. Numbers that no square has are not
    for us to resize: they fit as they are, or `load_state_dict` reports them.
    """
    if img_size is not None:
        sides = to_2tuple(img_size)
        for stride in range(1, min(sides) + 1):
            for rows, cols in (
                [side // stride for side in sides],
                [-(-side // stride) for side in sides],
            ):
                if rows * cols == count:
                    return rows, cols
    side = isqrt(max(count, 0))
    return (side, side) if side * side == count else None


def resize_positions(
    weights: dict[str, Tensor], model: nn.Module, img_size: Size | None = None
) -> dict[str, Tensor]:
    """Resize learned positions of a row of tokens to the grid of a model made for another size.

    Args:
        weights: In our keys, or of a model without such positions.
        model: The model to load into.
        img_size: That the weights were trained at; see `source_grid`.

    Returns:
        The weights, with other positions if the model has ``pos_embed`` and ``patch_embed`` and
        those of the checkpoint come from another grid.
    """
    target, positions = getattr(model, "pos_embed", None), weights.get("pos_embed")
    patch_embed = getattr(model, "patch_embed", None)
    if target is None or positions is None or patch_embed is None or positions.dim() != 3:
        return weights
    prefix = getattr(model, "num_prefix_tokens", 0)
    count = positions.shape[1] - prefix
    resizable = positions.shape[2] == target.shape[2]  # else it is for load_state_dict to report
    source = source_grid(count, img_size)
    if not resizable or source in (None, tuple(patch_embed.grid_size)):
        return weights
    resized = resample_abs_pos_embed(
        positions,
        new_size=list(patch_embed.grid_size),
        old_size=list(source),
        num_prefix_tokens=prefix,
    )
    return {**weights, "pos_embed": resized}
