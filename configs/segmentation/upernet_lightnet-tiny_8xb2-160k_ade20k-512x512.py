# LightNet, UperNet. Nothing is published of it in segmentation, nor any weights: every
# hyper-parameter here is ours, those of RALA (upernet_ravlt-s_...). Its one resolution becomes four
# maps in a simple feature pyramid (ViTDet, arXiv:2203.16527).
_base_ = [
    "./_base_/models/upernet.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/adamw_160k.py",
    "./_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        model="lightnet_tiny",
        out_norms=True,
        drop_path_rate=0.1,
    ),
    decode_head=dict(in_channels=[48, 96, 192, 192]),
    auxiliary_head=dict(in_channels=192),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale=512.0,
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}),
)
