# Mask R-CNN from scratch, all of it small, on the photographs of data/sample (docs/dense.md). Norms
# in neck and heads, without which nothing trains from scratch (GroupNorm: arXiv:1811.08883).
_base_ = [
    "./_base_/models/mask-rcnn.py",
    "./_base_/datasets/sample_coco.py",
    "./_base_/schedules/sample.py",
]
norm = dict(type="GN", num_groups=8)
model = dict(
    data_preprocessor=dict(pad_size_divisor=256),
    backbone=dict(model="test_ravlt", out_norms=True),
    neck=dict(in_channels=[24, 48, 64, 96], out_channels=64, norm_cfg=norm),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        # one more shape than usual: the rocket is a dozen times as high as it is wide
        anchor_generator=dict(ratios=[0.5, 1.0, 2.0, 8.0]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(
            type="ConvFCBBoxHead",
            num_shared_convs=2,
            num_shared_fcs=1,
            in_channels=64,
            conv_out_channels=64,
            fc_out_channels=256,
            num_classes=6,
            norm_cfg=norm,
        ),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(
            num_convs=2, in_channels=64, conv_out_channels=64, num_classes=6, norm_cfg=norm
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100)),
)
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(type="Resize", scale=(256, 256), keep_ratio=True),
            dict(type="PackDetInputs"),
        ]
    )
)
val_evaluator = dict(metric=["bbox", "segm"])
test_evaluator = val_evaluator
