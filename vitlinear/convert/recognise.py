"""Which model a checkpoint is of: the one whose keys and shapes are all there.

Models are built without storage, and the checkpoint filter translates the keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import timm
from torch import Tensor

from vitlinear import models as registry
from vitlinear.checkpoints.translate import MODEL, backbone_of, layout_of, rename, resize
from vitlinear.dense.backbone import MultiScaleBackbone
from vitlinear.errors import UserError
from vitlinear.facts import counts, family_of

# Models whose size is further from the checkpoint's than this factor are tried last.
NEAR = 1.6
# Sides of images that models with learned positions may have been made for, the usual ones first.
SIDES = (224, 384, 256, 512, 448, 320, 288, 192, 160, 128, 96, 640, 768, 1024)
SHOWN = 12  # keys of each kind in a report


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a checkpoint fits a model.

    Attributes:
        name: The model's.
        num_classes: Width of the classifier that the checkpoint has, or the model's; 0 for a
            backbone.
        in_chans: Likewise, channels of the image.
        weights: The checkpoint under the model's keys, or `MultiScaleBackbone`'s.
        missing: Keys that only the model has.
        unexpected: Keys that only the checkpoint has.
        reshaped: Keys whose shapes differ.
        matched: Weights, single numbers aside, whose key and shape are the model's.
        resampled: Weights that the filter had to compute anew, such as positions of another size.
    """

    name: str
    num_classes: int
    in_chans: int
    weights: Mapping[str, Tensor]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]
    matched: int
    resampled: int

    @property
    def problems(self) -> int:
        """Keys that do not fit."""
        return len(self.missing) + len(self.unexpected) + len(self.reshaped)


def fit(weights: Mapping[str, Tensor], name: str, **model_kwargs: Any) -> Fit:
    """Compare weights, of any known layout, with a registered model.

    The classifier may have any width, and the image any number of channels.
    """
    model = registry.on_meta(name, **model_kwargs)
    renamed, own = rename(weights, model), model.state_dict()
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    sizes = {"num_classes": cfg.num_classes, "in_chans": cfg.input_size[0]}
    other = dict(sizes)
    for key, module, axis in (("num_classes", cfg.classifier, 0), ("in_chans", cfg.first_conv, 1)):
        weight = f"{module}.weight"
        if weight in renamed and weight in own and renamed[weight].ndim > axis:
            groups = own[weight].shape[axis] // sizes[key] if axis else 1
            other[key] = renamed[weight].shape[axis] // max(groups, 1)
    if other != sizes and min(other.values()) > 0:
        model = registry.on_meta(name, **{**model_kwargs, **other})
        renamed, own = rename(weights, model), model.state_dict()
    return _compare(name, own, renamed, resize(renamed, model), **other)


def fit_backbone(weights: Mapping[str, Tensor], name: str) -> Fit:
    """Compare the backbone of a detector or segmentor with `MultiScaleBackbone`.

    The norms that the checkpoint has say which maps the backbone gives.
    """
    model_weights, norms = backbone_of(weights)
    indices = sorted({int(key.split(".")[1]) for key in norms})
    known = tuple(index for index in indices if index < 4)
    backbone = MultiScaleBackbone(name, known or (0, 1, 2, 3), bool(known), device="meta")
    model = backbone.model
    renamed = rename(model_weights, model)
    resized = resize(renamed, model)
    return _compare(
        name,
        backbone.state_dict(),
        {f"{MODEL}{key}": value for key, value in renamed.items()} | norms,
        {f"{MODEL}{key}": value for key, value in resized.items()} | norms,
        num_classes=0,
        in_chans=model.pretrained_cfg["input_size"][0],
    )


def _compare(
    name: str,
    own: Mapping[str, Tensor],
    renamed: Mapping[str, Tensor],
    converted: Mapping[str, Tensor],
    **sizes: int,
) -> Fit:
    """Compare a checkpoint, its keys translated and then resized too, with a model's weights."""
    return Fit(
        name,
        **sizes,
        weights=converted,
        missing=tuple(key for key in own if key not in converted),
        unexpected=tuple(key for key in converted if key not in own),
        reshaped=tuple(
            key for key in own if key in converted and own[key].shape != converted[key].shape
        ),
        matched=sum(
            value.ndim > 0 and key in converted and converted[key].shape == value.shape
            for key, value in own.items()
        ),
        resampled=sum(converted[key] is not renamed[key] for key in renamed),
    )


def _by_distance(weights: Mapping[str, Tensor]) -> list[list[str]]:
    """Registered models in two lists: those of about the checkpoint's size, and the others."""
    size = sum(tensor.numel() for tensor in weights.values() if tensor.is_floating_point())
    near: list[str] = []
    far: list[str] = []
    for name in registry.our_models():
        params = counts().get(name, {}).get("params", size)
        (near if 1 / NEAR < params / max(size, 1) < NEAR else far).append(name)
    return [near, far]


def recognise(
    weights: Mapping[str, Tensor],
    likely: Collection[str] = (),
    fit: Callable[[Mapping[str, Tensor], str], Fit] = fit,
) -> Fit:
    """Find the model that a checkpoint is of.

    Several can have the same keys and shapes. The one that is taken is, of those that need the
    fewest weights computed anew, the one that is likely; or, for a checkpoint in the authors'
    layout, one that they have released.

    Args:
        weights: Bare weights, of any known layout.
        likely: Models that the file is of by other signs, such as its name.
        fit: `fit`, or `fit_backbone` for the backbone of a detector or segmentor.

    Raises:
        UserError: No model fits, or several; the message names the nearest, or them.
    """
    tried: list[Fit] = []
    for names in _by_distance(weights):
        tried += [fit(weights, name) for name in names]
        if any(candidate.problems == 0 for candidate in tried):
            break
    fitting = [candidate for candidate in tried if candidate.problems == 0]
    if not fitting:
        nearest = max(tried, key=lambda candidate: (candidate.matched, -candidate.problems))
        message = "the checkpoint fits no model of this package"
        if not nearest.matched:
            raise UserError(f"{message}, and none is near: no weight has a model's name and shape")
        print(keys_report(nearest))
        raise UserError(
            f"{message}; nearest is {nearest.name}, which has {nearest.matched} of its "
            f"{len(weights)} tensors, with {summary(nearest)}"
        )
    least = min(candidate.resampled for candidate in fitting)
    fitting = [candidate for candidate in fitting if candidate.resampled == least]
    fitting = [c for c in fitting if c.name in likely] or fitting
    if len(fitting) > 1 and layout_of(weights) is not None:
        released = [c for c in fitting if family_of(c.name).model(c.name).released]
        fitting = released or fitting
    if len(fitting) > 1:
        several = ", ".join(candidate.name for candidate in fitting)
        raise UserError(f"the checkpoint fits several models: give --model, one of {several}")
    return fitting[0]


def at_own_size(weights: Mapping[str, Tensor], found: Fit) -> tuple[Fit, int | None]:
    """The fit to the same model made for the images that a checkpoint's positions are of.

    Args:
        weights: Bare weights, of any known layout.
        found: How they fit the model as it is registered.

    Returns:
        The fit, and the side of those images; ``found`` and None if it is that already, or if no
        side of `SIDES` has such positions.
    """
    if not found.resampled:
        return found, None
    for side in SIDES:
        try:
            candidate = fit(weights, found.name, img_size=side)
        except TypeError:  # the model is made for no size
            break
        if not candidate.problems and not candidate.resampled:
            return candidate, side
    return found, None


def _counts(candidate: Fit) -> str:
    return (
        f"{len(candidate.missing)} missing keys, {len(candidate.unexpected)} unexpected, "
        f"{len(candidate.reshaped)} of another shape"
    )


def summary(candidate: Fit) -> str:
    """How many keys do not fit, and the first of each kind, in words."""
    kinds = (candidate.missing, candidate.unexpected, candidate.reshaped)
    examples = ", ".join(keys[0] for keys in kinds if keys)
    return f"{_counts(candidate)}, such as {examples}"


def keys_report(candidate: Fit) -> str:
    """The same, with more of the keys and what was computed anew, in lines."""
    lines = [f"keys          {_counts(candidate)}"]
    for label, keys in (
        ("missing", candidate.missing),
        ("unexpected", candidate.unexpected),
        ("of another shape", candidate.reshaped),
    ):
        lines += [f"  {label}: {key}" for key in keys[:SHOWN]]
        if len(keys) > SHOWN:
            lines.append(f"  {label}: and {len(keys) - SHOWN} more")
    if candidate.resampled:
        lines.append(
            f"resized       {candidate.resampled} tables of positions, which are of images of "
            "another size than the model's"
        )
    return "\n".join(lines)
