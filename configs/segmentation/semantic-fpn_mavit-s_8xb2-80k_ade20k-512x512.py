_base_ = "./semantic-fpn_mavit-t_8xb2-80k_ade20k-512x512.py"
model = dict(
    backbone=dict(model="mavit_s", drop_path_rate=0.15),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
