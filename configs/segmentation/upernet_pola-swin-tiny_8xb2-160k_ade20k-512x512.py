# Pola-Swin, UperNet. The paper (arXiv:2501.15061) has results on ADE20K; no configuration is
# released, so every hyper-parameter here is ours: those that mmseg gives Swin,
# with its drop path of 0.3 and a layer norm on each map.
# The weights are at huggingface.co/ZachMeng/PolaFormer, in files whose names are not known here:
# give one with --cfg-options model.backbone.init_cfg.type=Pretrained
# model.backbone.init_cfg.checkpoint=FILE.
_base_ = [
    "./_base_/models/upernet.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/adamw_160k.py",
    "./_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        model="pola_swin_tiny",
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
