# RALA, Mask R-CNN 3x: the authors' configuration, github.com/qhfan/RALA at a86314f,
# detection/configs/RALA. Stem and downsampling have SyncBN, whose statistics the authors do not
# freeze (their norm_eval looks for BatchNorm2d); a layer norm is on each map. Not stated: the
# number of GPUs.
# Weight decay: the authors exempt names that hold `norm`, among which are, there, the batch norms
# of downsampling but not those of the stem; layer-scales are decayed. `downsample.bn` is what the
# former are called here.
_base_ = [
    "./_base_/models/mask-rcnn.py",
    "./_base_/datasets/coco_instance_ms-crop.py",
    "./_base_/schedules/adamw_3x.py",
    "mmdet::_base_/default_runtime.py",
]
sync_bn = "torch"
model = dict(
    backbone=dict(
        model="ravlt_s",
        out_norms=True,
        pretrained=True,
        drop_path_rate=0.15,
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    optimizer=dict(lr=0.0001, weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={"norm": dict(decay_mult=0.0), "downsample.bn": dict(decay_mult=0.0)},
    ),
)
