_base_ = "./semantic-fpn_pola-pvt-tiny_8xb2-80k_ade20k-512x512.py"
model = dict(
    backbone=dict(model="pola_pvt_base", drop_path_rate=0.3),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
