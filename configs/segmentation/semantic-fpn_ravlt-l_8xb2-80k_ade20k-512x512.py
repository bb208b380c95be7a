_base_ = "./semantic-fpn_ravlt-t_8xb2-80k_ade20k-512x512.py"
model = dict(
    backbone=dict(model="ravlt_l", drop_path_rate=0.55),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
