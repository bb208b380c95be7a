# NaLaFormer, Mask R-CNN 1x. The authors announce detection but have released neither configurations
# nor weights: every hyper-parameter here is ours, those of RALA (mask-rcnn_ravlt-t_fpn_1x_coco.py),
# whose pyramid it shares. Drop path as in classification.
_base_ = [
    "./_base_/models/mask-rcnn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "./_base_/schedules/adamw_1x.py",
    "mmdet::_base_/default_runtime.py",
]
sync_bn = "torch"
model = dict(
    backbone=dict(
        model="nalaformer_xt",
        out_norms=True,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[32, 64, 128, 384]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    paramwise_cfg=dict(
        custom_keys={"norm": dict(decay_mult=0.0), "downsample.bn": dict(decay_mult=0.0)},
    ),
)
