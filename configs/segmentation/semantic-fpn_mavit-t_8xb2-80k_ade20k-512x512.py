# MALA, Semantic FPN: the authors' configuration, github.com/qhfan/MALA at 7114e63,
# segmentation/configs/MALA. SyncBN in stem and downsampling, a layer norm on each map. The authors'
# scripts start it on 8 GPUs. Tests take whole images at one scale.
# No place of classification weights of T and S is confirmed: give a file with --cfg-options
# model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE.
_base_ = [
    "./_base_/models/semantic-fpn.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/adamw_80k.py",
    "./_base_/default_runtime.py",
]
sync_bn = "torch"
model = dict(
    backbone=dict(
        model="mavit_t",
        out_norms=True,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
