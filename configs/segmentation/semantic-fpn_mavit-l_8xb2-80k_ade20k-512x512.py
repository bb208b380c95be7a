_base_ = "./semantic-fpn_mavit-t_8xb2-80k_ade20k-512x512.py"
model = dict(
    backbone=dict(model="mavit_l", drop_path_rate=0.55, pretrained=True),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
