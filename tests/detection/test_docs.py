"""The config of docs/openmmlab.md that fine-tunes a detector trains one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.commands import Command
from tests.dense.openmmlab import build, packages
from vitlinear.dense import coco

pytestmark = packages()
pytest.importorskip("skimage")

PAGE = Path(__file__).parents[2] / "docs" / "openmmlab.md"
# What is as large as published in the page's config is small here.
SMALL = """
_base_ = "./boxes.py"
model = dict(
    backbone=dict(model="test_ravlt"),
    neck=dict(in_channels=[24, 48, 64, 96], out_channels=32),
    bbox_head=dict(in_channels=32, feat_channels=32, stacked_convs=1),
)
load = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(160, 128), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
]
keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
here = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(**here, dataset=dict(pipeline=[*load, dict(type="PackDetInputs")]))
val_dataloader = dict(
    **here, dataset=dict(pipeline=[*load, dict(type="PackDetInputs", meta_keys=keys)])
)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1)
"""


@pytest.mark.slow
def test_fine_tuning(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts from a detector of 80 classes, and trains and tests one of the sample's six."""
    from mmengine.config import Config

    monkeypatch.chdir(tmp_path)
    coco.write_sample(tmp_path / "data" / "sample" / "coco")
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python needs-mmdet\n(# boxes\.py\n.*?)```", text, re.DOTALL)
    Path("boxes.py").write_text(code)
    Path("small.py").write_text(SMALL)
    import vitlinear.registry  # noqa: F401  # for `vitlinear::`

    config = Config.fromfile("small.py")
    assert config.model.bbox_head.num_classes == 6
    config.model.bbox_head.num_classes = 80
    published = build(config.model, "mmdet").state_dict()
    torch.save({"state_dict": published}, "coco.pth")

    result = command("train-detector", "small.py", "--no-amp", "--auto-scale-lr")
    assert result.code == 0, result.err
    weights = torch.load("work_dirs/small/epoch_1.pth", weights_only=False)["state_dict"]
    head = "bbox_head.retina_cls.weight"
    assert weights[head].shape[0] == 6 * 9 and published[head].shape[0] == 80 * 9
    for name, weight in weights.items():
        if weight.is_floating_point() and "retina_cls" not in name and "running" not in name:
            torch.testing.assert_close(weight, published[name], rtol=0, atol=1e-5)
