# RetinaNet from scratch, all of it small, on the photographs of data/sample (docs/dense.md). Norms
# in neck and heads, without which nothing trains from scratch (GroupNorm: arXiv:1811.08883).
_base_ = [
    "./_base_/models/retinanet.py",
    "./_base_/datasets/sample_coco.py",
    "./_base_/schedules/sample.py",
]
norm = dict(type="GN", num_groups=8)
model = dict(
    data_preprocessor=dict(pad_size_divisor=256),
    backbone=dict(model="test_ravlt", out_norms=True, out_indices=(1, 2, 3)),
    neck=dict(in_channels=[48, 64, 96], start_level=0, out_channels=64, norm_cfg=norm),
    bbox_head=dict(
        num_classes=6,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=norm,
        # one more shape than usual: the rocket is a dozen times as high as it is wide
        anchor_generator=dict(ratios=[0.5, 1.0, 2.0, 8.0]),
    ),
)
