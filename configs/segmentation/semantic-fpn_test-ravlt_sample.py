# Semantic FPN from scratch, all of it small, on the photographs of data/sample (docs/dense.md).
_base_ = [
    "./_base_/models/semantic-fpn.py",
    "./_base_/datasets/sample_ade.py",
    "./_base_/schedules/sample.py",
]
data_preprocessor = dict(size=(256, 256), test_cfg=dict(size=(256, 256)))
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(model="test_ravlt", out_norms=True),
    neck=dict(in_channels=[24, 48, 64, 96], out_channels=64),
    decode_head=dict(
        in_channels=[64, 64, 64, 64],
        channels=64,
        num_classes=7,
        norm_cfg=dict(_delete_=True, type="GN", num_groups=8),
        # a three hundredth of all pixels is spoon
        loss_decode=dict(class_weight=[1.0, 1.0, 1.0, 1.0, 10.0, 1.0, 1.0]),
    ),
)
