"""Shared by tests with mmdet and mmseg: the packages, or the reason of a skip; two configs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import Command
from vitlinear.errors import UserError


def packages() -> pytest.MarkDecorator:
    """The mark of test files that need OpenMMLab's packages, which are skipped without them.

    In continuous integration they have to be installed.
    """
    if importlib.util.find_spec("mmcv") is None and not os.environ.get("CI"):
        pytest.skip(
            "OpenMMLab's packages are not installed (python3 tools/run_tests.py installs them)",
            allow_module_level=True,
        )
    return pytest.mark.openmmlab


def build(config: Any, scope: str) -> Any:
    """A detector or segmentor from its config; ``scope`` is ``mmdet`` or ``mmseg``."""
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(scope)
    return MODELS.build(config)


def stop_at_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """End the commands, by the error "stopped", where they would build a runner."""
    from vitlinear.dense.openmmlab import commands

    def stop(*args: object, **kwargs: object) -> None:
        raise UserError("stopped")

    monkeypatch.setattr(commands, "build_runner", stop)


def refusal(command: Command, name: str, config: Path, options: Sequence[str], folder: Path) -> str:
    """The one error of a command that begins nothing, ``train-detector`` or ``test-...``."""
    words: list[object] = [name, config, "--work-dir", folder / "work"]
    if name.startswith("test"):
        torch.save({}, folder / "model.pth")
        words.insert(2, folder / "model.pth")
    result = command(*words, *(["--cfg-options", *options] if options else []))
    error: str = result.err.splitlines()[-1]
    assert result.code == 2 and error.startswith("error: "), result
    assert not (folder / "work").exists()
    return error


def detector(path: Path, data: Path, more: str = "") -> Path:
    """Write the config of a small RetinaNet on the sample data, two iterations an epoch."""
    path.write_text(
        f"""
_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py", "mmdet::_base_/default_runtime.py"]
custom_imports = dict(imports=["vitlinear.detection"], allow_failed_imports=False)
model = dict(
    data_preprocessor=dict(type="vitlinear.DetDataPreprocessor"),
    backbone=dict(_delete_=True, type="vitlinear.Backbone", model="test_ravlt", out_norms=True),
    neck=dict(in_channels=[24, 48, 64, 96], out_channels=32),
    bbox_head=dict(num_classes=6, in_channels=32, feat_channels=32, stacked_convs=1),
)
classes = ("person", "cat", "cup", "spoon", "coin", "rocket")
load = [dict(type="LoadImageFromFile"), dict(type="Resize", scale=(160, 128), keep_ratio=True)]
labels = dict(type="LoadAnnotations", with_bbox=True)
keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
sample = dict(type="CocoDataset", data_root={str(data)!r}, metainfo=dict(classes=classes))
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=True),
    batch_sampler=dict(type="AspectRatioBatchSampler", drop_last=True),
    dataset=dict(
        **sample, ann_file="annotations/instances_train.json", data_prefix=dict(img="images/"),
        pipeline=[*load, labels, dict(type="RandomFlip", prob=0.5), dict(type="PackDetInputs")],
    ),
)
val_dataloader = dict(
    batch_size=2, num_workers=0, drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **sample, ann_file="annotations/instances_val.json", data_prefix=dict(img="images/"),
        test_mode=True, pipeline=[*load, labels, dict(type="PackDetInputs", meta_keys=keys)],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="CocoMetric", ann_file={str(data / "annotations/instances_val.json")!r}, metric="bbox"
)
test_evaluator = val_evaluator
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=1, val_interval=1)
val_cfg, test_cfg = dict(type="ValLoop"), dict(type="TestLoop")
auto_scale_lr = dict(enable=False, base_batch_size=16)
find_unused_parameters = True  # the pyramid starts at the second map
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
    constructor="vitlinear.LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay=0.9, norm_decay_mult=0.0),
)
{more}
"""
    )
    return path


def segmentor(path: Path, data: Path, more: str = "") -> Path:
    """Write the config of a small Semantic FPN on the sample data, for two iterations."""
    path.write_text(
        f"""
_base_ = [
    __import__("mmseg").__path__[0] + "/.mim/configs/_base_/" + name
    for name in ("models/fpn_r50.py", "default_runtime.py")
]
custom_imports = dict(imports=["vitlinear.segmentation"], allow_failed_imports=False)
model = dict(
    pretrained=None,
    data_preprocessor=dict(_delete_=True, type="vitlinear.SegDataPreProcessor", size=(96, 128)),
    backbone=dict(_delete_=True, type="vitlinear.Backbone", model="test_ravlt", out_norms=True),
    neck=dict(in_channels=[24, 48, 64, 96], out_channels=32),
    decode_head=dict(
        in_channels=[32] * 4, channels=32, num_classes=7, norm_cfg=dict(type="BN")
    ),
)
classes = ("background", "person", "cat", "cup", "spoon", "coin", "rocket")
palette = [[20 * i, 255 - 20 * i, 0] for i in range(7)]
load = [dict(type="LoadImageFromFile"), dict(type="Resize", scale=(128, 96), keep_ratio=True)]
labels = dict(type="LoadAnnotations", reduce_zero_label=True)
sample = dict(
    type="BaseSegDataset", data_root={str(data)!r}, seg_map_suffix=".png", reduce_zero_label=True,
    metainfo=dict(classes=classes, palette=palette),
)
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **sample,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=[load[0], labels, load[1], dict(type="PackSegInputs")],
    ),
)
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **sample,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=[*load, labels, dict(type="PackSegInputs")],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
tta_pipeline = [
    load[0],
    dict(type="TestTimeAug", transforms=[
        [load[1]], [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)],
        [labels], [dict(type="PackSegInputs")],
    ]),
]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=1),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2),
    visualization=dict(type="SegVisualizationHook"),
)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=2, val_interval=2)
val_cfg, test_cfg = dict(type="ValLoop"), dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05)
)
{more}
"""
    )
    return path
