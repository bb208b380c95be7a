"""Detectors and segmentors of mmdet 2 and mmseg 0, for today's mmdet 3 and mmsegmentation 1.

The backbone's keys become those of ``vitlinear.Backbone``. All others stay: necks and heads of the
published architectures are called the same in both generations, and the model zoos of mmdet 3 and
mmsegmentation 1 themselves list files of the older generation ("v2.0", "v0.5") as the weights of
today's configs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlinear.checkpoints.translate import BACKBONE, MODEL
from vitlinear.errors import UserError
from vitlinear.facts import PublishedFile, families
from vitlinear.files import write_atomically

from .original import OriginalFile
from .recognise import SHOWN, Fit, fit_backbone, keys_report, recognise, summary

# Parts of the published detectors and segmentors besides the backbone.
PARTS = ("neck", "rpn_head", "bbox_head", "roi_head", "decode_head", "auxiliary_head")

# Published architectures and a key that only they have, first that fits.
ARCHITECTURES = (
    ("Cascade Mask R-CNN", r"roi_head\.mask_head\.\d\."),
    ("Mask R-CNN", r"roi_head\.mask_head\."),
    ("RetinaNet", r"bbox_head\.retina_cls\."),
    ("UperNet", r"decode_head\.fpn_bottleneck\."),
    ("Semantic FPN", r"decode_head\.scale_heads\."),
)

# The authors' configs, which training scripts save as text, name the backbone. RAVLT and MAViT
# without their classifiers have the same keys and shapes.
TYPE = re.compile(r"backbone\s*=\s*dict\(\s*type\s*=\s*['\"](\w+)['\"]")

CLASSES = {"coco": 80, "ade20k": 150}


def architecture_of(weights: Mapping[str, Tensor]) -> str | None:
    """Name of a published architecture, by its heads; None for others."""
    return next(
        (name for name, marker in ARCHITECTURES if any(re.match(marker, key) for key in weights)),
        None,
    )


def dataset_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Class names and palette as mmengine wants them, from what mmcv 1 saved."""
    values = {name: meta.get(name.upper()) for name in ("classes", "palette")}
    return {name: value for name, value in values.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    """Whether this is text, numbers, or lists of such: all that goes into a converted file."""
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, str | int | float)


def _likely(meta: Mapping[str, Any], row: PublishedFile | None) -> set[str]:
    """Backbones that the name of the file, or the config in it, tells of."""
    if row is not None:
        return {row.model}
    named = TYPE.search(str(meta.get("config", "")))
    return {
        model
        for family in families().values()
        if named and family.backbone_type == named[1]
        for model in family.models
    }


def _find(source: OriginalFile, model: str | None, likely: set[str]) -> Fit:
    weights = {key: v for key, v in source.weights.items() if key.startswith(BACKBONE)}
    if model is None:
        return recognise(weights, likely, fit_backbone)
    found = fit_backbone(weights, model)
    if found.problems:
        print(keys_report(found))
        raise UserError(
            f"the backbone in checkpoint {source.path} does not fit {model}: {summary(found)}"
        )
    return found


def _confirmed(
    source: OriginalFile, found: Fit, architecture: str | None, meta: Mapping[str, Any]
) -> PublishedFile | None:
    """The row of the source's match, unless what is in the file is something else."""
    row = source.match[0] if source.match else None
    if row is None or row.model != found.name or architecture is None:
        return None
    task, classes = row.task.partition(": ")[2], meta.get("classes")
    other = classes is not None and len(classes) != CLASSES[row.tag]
    return row if task.startswith(architecture) and not other else None


def convert_detector(source: OriginalFile, target: Path, model: str | None = None) -> list[str]:
    """Convert a detector or segmentor.

    Args:
        source: The authors' checkpoint.
        target: A file that mmengine's ``load_from`` takes; appears whole or not at all.
        model: Registered name of the backbone; by default, recognised.

    Returns:
        What was done, in lines.

    Raises:
        UserError: The backbone is none of this package's, or some keys belong to no known part.
    """
    if any(key.startswith(BACKBONE + MODEL) for key in source.weights):
        raise UserError(
            f"checkpoint {source.path} has today's keys already: load_from= takes it as it is"
        )
    heads = {key: v for key, v in source.weights.items() if not key.startswith(BACKBONE)}
    if unknown := [key for key in heads if key.partition(".")[0] not in PARTS]:
        raise UserError(
            f"checkpoint {source.path} has {len(unknown)} keys of no part that is known "
            f"({', '.join(PARTS)}): {', '.join(unknown[:SHOWN])}"
        )
    saved = source.checkpoint.get("meta")
    saved = saved if isinstance(saved, Mapping) else {}
    found = _find(source, model, _likely(saved, source.match[0] if source.match else None))
    names, architecture = dataset_meta(saved), architecture_of(heads)
    metadata = source.metadata(found.name, _confirmed(source, found, architecture, names))
    state_dict = {f"{BACKBONE}{key}": value for key, value in found.weights.items()} | heads
    meta = {**metadata, **({"dataset_meta": names} if names else {})}
    content = {"meta": meta, "state_dict": state_dict}
    write_atomically(target, lambda temporary: torch.save(content, temporary))
    norms = sorted({key.split(".")[1] for key in found.weights if key.startswith("norms.")})
    parts = ", ".join(part for part in PARTS if any(key.startswith(f"{part}.") for key in heads))
    backbone = f"backbone      model='{found.name}'"
    if norms:
        backbone += f", out_norms=True, out_indices=({', '.join(norms)})"
    classes = f", {len(names['classes'])} classes" if "classes" in names else ""
    return [
        *source.report(
            found,
            metadata,
            backbone,
            f"architecture  {architecture or 'not a published one'}{classes}; {parts or 'no heads'}"
            " kept as they are",
        ),
        f"wrote         {target}",
    ]
