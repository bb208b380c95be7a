# L2ViT, UperNet: the authors' configuration, github.com/ChuanyangZheng/L2ViT at fad0341,
# semantic_segmentation/configs/novel, on 8 GPUs. No rules by parameter (the authors have switched
# theirs off), no mixed precision; batch norms of backbone and heads are those of one GPU; drop path
# 0.3 in all sizes. Not released: the files of data and schedule that it builds on, taken here to be
# those of mmseg; results (they stand in the paper alone).
_base_ = [
    "./_base_/models/upernet.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/adamw_160k.py",
    "./_base_/default_runtime.py",
]
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    backbone=dict(
        model="l2vit_tiny",
        out_norms=True,
        out_norm_eps=1e-5,
        pretrained=True,
        drop_path_rate=0.3,
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768], norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=384, norm_cfg=norm_cfg),
)
