"""Detectors and segmentors as the authors' training scripts, on mmcv 1, saved them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests import golden

# What follows the stages in a classifier, by family; its backbones for detection end before.
AFTER_STAGES = {
    **dict.fromkeys(("rala", "mala"), ("proj.", "norm.", "head.")),
    **dict.fromkeys(("l2vit", "mlla"), ("norm.", "head.")),
}
OUTPUT_NORM = {
    **dict.fromkeys(("rala", "mala"), "extra_norms.{}.norm"),
    **dict.fromkeys(("l2vit", "mlla"), "norm{}"),
}

CONFIG = """model = dict(
    type='{detector}',
    backbone=dict(
        type='{backbone}',
        out_indices=(0, 1, 2, 3)),
    neck=dict(type='FPN'))
"""


def entries(family: str, released: str) -> list[list[Any]]:
    """[key, shape, dtype] of a released classifier."""
    return golden.variants(family)[released]["state_dict"]


def classifier(family: str, released: str) -> dict[str, Tensor]:
    """Weights under the authors' keys."""
    weights = golden.upstream_state_dict(entries(family, released))
    return {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}


def output_norms(family: str, dims: Sequence[int], indices: Sequence[int]) -> dict[str, Tensor]:
    """Norms behind the stages, under the authors' keys."""
    made = {}
    for index in indices:
        for name in ("weight", "bias"):
            key = f"{OUTPUT_NORM[family].format(index)}.{name}"
            made[key] = golden.weight(key, [dims[index]]).float()
    return made


def checkpoint(
    family: str,
    stages: Mapping[str, Tensor],
    norms: Mapping[str, Tensor],
    heads: Mapping[str, Tensor],
    classes: Sequence[str] = ("person", "bicycle"),
    backbone: str = "",
    **meta: Any,
) -> dict[str, Any]:
    """All that is in such a file.

    Args:
        family: Of the backbone.
        stages: A classifier, under the authors' keys.
        norms: Of `output_norms`.
        heads: Necks and heads, under their own keys.
        classes: Names.
        backbone: Its type in the authors' config.
        **meta: More of it.
    """
    body = {k: v for k, v in stages.items() if not k.startswith(AFTER_STAGES[family])}
    return {
        "meta": {
            "env_info": "sys.platform: linux\nMMDetection: 2.25.0",
            "config": CONFIG.format(detector="RetinaNet", backbone=backbone),
            "seed": None,
            "mmcv_version": "1.4.8",
            "epoch": 12,
            "iter": 87960,
            "hook_msgs": {"best_score": np.float64(0.459)},
            "CLASSES": tuple(classes),
            "PALETTE": [[220, 20, 60], [119, 11, 32]],
            **meta,
        },
        "state_dict": {f"backbone.{key}": v for key, v in {**body, **norms}.items()} | dict(heads),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(1000)}}, "param_groups": []},
    }
