# MILA (MLLA), Cascade Mask R-CNN 3x. Nothing of the kind is published: every hyper-parameter here
# is ours, that of the authors' Mask R-CNN 3x, github.com/LeapLabTHU/MLLA at 66b6d29.
# Weight decay: the authors exempt names that hold `norm`, among which are, there, the batch norms
# of stem and downsampling: `bn` is what those are called here.
# The weights are behind share links: give a file with --cfg-options
# model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE.
_base_ = [
    "./_base_/models/cascade-mask-rcnn.py",
    "./_base_/datasets/coco_instance_ms-crop.py",
    "./_base_/schedules/adamw_3x.py",
    "mmdet::_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        model="mila_tiny",
        out_norms=True,
        out_norm_eps=1e-5,
        drop_path_rate=0.3,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            "norm": dict(decay_mult=0.0),
            "stem.conv1.bn": dict(decay_mult=0.0),
            "stem.conv2.bn": dict(decay_mult=0.0),
            "stem.conv3.bn": dict(decay_mult=0.0),
            "stem.conv4.bn": dict(decay_mult=0.0),
            "stem.conv5.bn": dict(decay_mult=0.0),
            "downsample.conv3.bn": dict(decay_mult=0.0),
        },
    ),
)
