# LightNet, Mask R-CNN 1x. Nothing is published of it in detection, nor any weights: every
# hyper-parameter here is ours, those of RALA (mask-rcnn_ravlt-t_fpn_1x_coco.py). Its one resolution
# becomes four maps in a simple feature pyramid (ViTDet, arXiv:2203.16527).
_base_ = [
    "./_base_/models/mask-rcnn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "./_base_/schedules/adamw_1x.py",
    "mmdet::_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        model="lightnet_tiny",
        out_norms=True,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[48, 96, 192, 192]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}),
)
