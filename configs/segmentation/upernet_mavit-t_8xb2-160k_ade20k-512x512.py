# MALA, UperNet: the authors' configuration, github.com/qhfan/MALA at 7114e63,
# segmentation/configs/MALA. SyncBN in stem and downsampling, a layer norm on each map. Not stated:
# the number of GPUs (8 here, as in MALA's scripts for Semantic FPN). Tests take whole images at one
# scale.
# Weight decay: the authors exempt names that hold `norm`, among which are, there, the batch norms
# of downsampling but not those of the stem; layer-scales are decayed. `downsample.bn` is what the
# former are called here.
# No place of classification weights of T and S is confirmed: give a file with --cfg-options
# model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE.
_base_ = [
    "./_base_/models/upernet.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/adamw_160k.py",
    "./_base_/default_runtime.py",
]
sync_bn = "torch"
model = dict(
    backbone=dict(
        model="mavit_t",
        out_norms=True,
        drop_path_rate=0.1,
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale=512.0,
    paramwise_cfg=dict(
        custom_keys={"norm": dict(decay_mult=0.0), "downsample.bn": dict(decay_mult=0.0)},
    ),
)
