# RALA, Semantic FPN: the authors' configuration, github.com/qhfan/RALA at a86314f,
# segmentation/configs/RALA. SyncBN in stem and downsampling, a layer norm on each map. Not stated:
# the number of GPUs (8 here, as in MALA's scripts for Semantic FPN). Tests take whole images at one
# scale. There is no configuration for T, though its result is published: it is taken to be that of
# S.
_base_ = [
    "./_base_/models/semantic-fpn.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/adamw_80k.py",
    "./_base_/default_runtime.py",
]
sync_bn = "torch"
model = dict(
    backbone=dict(
        model="ravlt_t",
        out_norms=True,
        pretrained=True,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
