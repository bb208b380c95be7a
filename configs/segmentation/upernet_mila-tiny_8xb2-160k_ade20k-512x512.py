# MILA (MLLA), UperNet. The authors have a configuration for B alone, on 8 GPUs by its comment:
# github.com/LeapLabTHU/MLLA at 66b6d29, downstream/segmentation. T and S are ours: as B, with the
# drop path of their classifiers. A layer norm is on each map; maps with odd sides are padded before
# they are downsampled. Not stated: mixed precision (here none); whether batch norms of the backbone
# are synchronised (here each GPU has its own). Tests take whole images at one scale.
# Weight decay: the authors exempt names that hold `norm`, among which are, there, the batch norms
# of stem and downsampling: `bn` is what those are called here.
# The weights are behind share links: give a file with --cfg-options
# model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE.
_base_ = [
    "./_base_/models/upernet.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/adamw_160k.py",
    "./_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        model="mila_tiny",
        out_norms=True,
        out_norm_eps=1e-5,
        drop_path_rate=0.2,
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
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
