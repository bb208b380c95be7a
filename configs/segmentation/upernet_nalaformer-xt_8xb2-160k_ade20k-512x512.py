# NaLaFormer, UperNet. The authors announce segmentation but have released neither configurations
# nor weights: every hyper-parameter here is ours, those of RALA (upernet_ravlt-s_...), whose
# pyramid it shares. Drop path as in classification.
_base_ = [
    "./_base_/models/upernet.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/adamw_160k.py",
    "./_base_/default_runtime.py",
]
sync_bn = "torch"
model = dict(
    backbone=dict(
        model="nalaformer_xt",
        out_norms=True,
        drop_path_rate=0.1,
    ),
    decode_head=dict(in_channels=[32, 64, 128, 384]),
    auxiliary_head=dict(in_channels=128),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale=512.0,
    paramwise_cfg=dict(
        custom_keys={"norm": dict(decay_mult=0.0), "downsample.bn": dict(decay_mult=0.0)},
    ),
)
