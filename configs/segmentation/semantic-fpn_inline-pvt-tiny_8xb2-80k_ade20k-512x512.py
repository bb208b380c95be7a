# InLine-PVT, Semantic FPN. The paper (arXiv:2412.06590) has results of this kind (39.16 mIoU for T,
# by a secondary source); its configurations are not released, so every hyper-parameter here is
# ours: those of RALA's Semantic FPN, drop path as in classification, no norms on the maps, as in
# PVT.
# The weights are behind share links: give a file with --cfg-options
# model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE.
_base_ = [
    "./_base_/models/semantic-fpn.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/adamw_80k.py",
    "./_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        model="inline_pvt_tiny",
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
