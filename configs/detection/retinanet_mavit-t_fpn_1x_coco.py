# MALA, RetinaNet 1x: the authors' configuration, github.com/qhfan/MALA at 7114e63,
# detect/configs/MALA. Stem and downsampling have SyncBN, whose statistics the authors do not freeze
# (their norm_eval looks for BatchNorm2d); a layer norm is on each map. Not stated: the number of
# GPUs.
# No place of classification weights of T and S is confirmed: give a file with --cfg-options
# model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE.
_base_ = [
    "./_base_/models/retinanet.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "./_base_/schedules/adamw_1x.py",
    "mmdet::_base_/default_runtime.py",
]
sync_bn = "torch"
# The FPN takes levels 1 to 3, so nothing trains the norm of level 0, which published weights hold.
find_unused_parameters = True
model = dict(
    backbone=dict(
        model="mavit_t",
        out_norms=True,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper", loss_scale=512.0, optimizer=dict(lr=0.0004, weight_decay=0.0001)
)
