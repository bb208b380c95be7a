# Pola-PVT, Mask R-CNN 1x. The paper (arXiv:2501.15061) has results on COCO; no configuration is
# released, so every hyper-parameter here is ours: those that mmdet gives PVT (AdamW, 1e-4 for rate
# and decay), drop path as in classification, no norms on the maps, as in PVT.
# Weights of T and S are at huggingface.co/ZachMeng/PolaFormer, in files whose names are not known
# here: give one with --cfg-options model.backbone.init_cfg.type=Pretrained
# model.backbone.init_cfg.checkpoint=FILE.
_base_ = [
    "./_base_/models/mask-rcnn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "./_base_/schedules/adamw_1x.py",
    "mmdet::_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        model="pola_pvt_tiny",
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
optim_wrapper = dict(optimizer=dict(weight_decay=0.0001))
