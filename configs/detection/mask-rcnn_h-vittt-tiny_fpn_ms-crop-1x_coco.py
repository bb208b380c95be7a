# H-ViT³, Mask R-CNN 1x: the authors' configuration, github.com/LeapLabTHU/ViTTT at e347758,
# detection/. 1x too is trained at many scales. Gradient checkpointing is on; a layer norm is on
# each map; maps with odd sides are padded before they are downsampled. The authors' backbone has
# another inner scale in its first forward pass than in all later ones; here it is that of the later
# ones. Not stated: the number of GPUs; whether batch norms are synchronised (here each GPU has its
# own).
# Weight decay: the authors exempt names that hold `norm`, among which are, there, the batch norms
# of stem and downsampling: `bn` is what those are called here.
# The weights are behind share links: give a file with --cfg-options
# model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE.
_base_ = [
    "./_base_/models/mask-rcnn.py",
    "./_base_/datasets/coco_instance_ms-crop.py",
    "./_base_/schedules/adamw_1x.py",
    "mmdet::_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        model="h_vittt_tiny",
        out_norms=True,
        out_norm_eps=1e-5,
        grad_checkpointing=True,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    optimizer=dict(lr=0.0002, weight_decay=0.05),
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
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
