# InLine-Swin, UperNet. The paper (arXiv:2412.06590) has results of this kind (45.57 mIoU for T, by
# a secondary source); its configurations are not released, so every hyper-parameter here is ours:
# those that mmseg gives Swin, with its drop path of 0.3 and a layer norm on each map.
# The weights are behind share links: give a file with --cfg-options
# model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE.
_base_ = [
    "./_base_/models/upernet.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/adamw_160k.py",
    "./_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        model="inline_swin_tiny",
        out_norms=True,
        out_norm_eps=1e-5,
        drop_path_rate=0.3,
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            "relative_position_bias_table": dict(decay_mult=0.0),
            "norm": dict(decay_mult=0.0),
        },
    ),
)
