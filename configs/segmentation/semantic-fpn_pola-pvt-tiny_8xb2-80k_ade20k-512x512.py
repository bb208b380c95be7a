# Pola-PVT, Semantic FPN. The paper (arXiv:2501.15061) has results on ADE20K; no configuration is
# released, so every hyper-parameter here is ours: those of RALA's Semantic FPN, drop path as in
# classification, no norms on the maps, as in PVT.
# Weights of T and S are at huggingface.co/ZachMeng/PolaFormer, in files whose names are not known
# here: give one with --cfg-options model.backbone.init_cfg.type=Pretrained
# model.backbone.init_cfg.checkpoint=FILE.
_base_ = [
    "./_base_/models/semantic-fpn.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/adamw_80k.py",
    "./_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        model="pola_pvt_tiny",
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
