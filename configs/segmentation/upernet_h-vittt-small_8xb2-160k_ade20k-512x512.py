# As T, but in single precision.
_base_ = "./upernet_h-vittt-tiny_8xb2-160k_ade20k-512x512.py"
model = dict(backbone=dict(model="h_vittt_small", drop_path_rate=0.4))
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=0.00006, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(
        custom_keys={
            "norm": dict(decay_mult=0.0),
            "stem.conv1.bn": dict(decay_mult=0.0),
            "stem.conv2.bn": dict(decay_mult=0.0),
            "stem.conv3.bn": dict(decay_mult=0.0),
            "stem.conv4.bn": dict(decay_mult=0.0),
            "stem.conv5.bn": dict(decay_mult=0.0),
            "downsample.conv3.bn": dict(decay_mult=0.0),
        },
    ),
)
