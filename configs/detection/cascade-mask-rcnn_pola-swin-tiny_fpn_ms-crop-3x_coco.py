# Pola-Swin, Cascade Mask R-CNN 3x. The paper (arXiv:2501.15061) has results on COCO; no
# configuration is released, so every hyper-parameter here is ours, the schedule too: what mmdet
# gives Swin (AdamW, 1e-4, decay 0.05 but for norms and tables of relative positions, drop
# path 0.2 for T and S, a layer norm on each map), and drop path 0.3 for B.
# The weights are at huggingface.co/ZachMeng/PolaFormer, in files whose names are not known here:
# give one with --cfg-options model.backbone.init_cfg.type=Pretrained
# model.backbone.init_cfg.checkpoint=FILE.
_base_ = [
    "./_base_/models/cascade-mask-rcnn.py",
    "./_base_/datasets/coco_instance_ms-crop.py",
    "./_base_/schedules/adamw_3x.py",
    "mmdet::_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        model="pola_swin_tiny",
        out_norms=True,
        out_norm_eps=1e-5,
        drop_path_rate=0.2,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            "relative_position_bias_table": dict(decay_mult=0.0),
            "norm": dict(decay_mult=0.0),
        },
    ),
)
