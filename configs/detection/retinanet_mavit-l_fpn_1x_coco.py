_base_ = "./retinanet_mavit-t_fpn_1x_coco.py"
model = dict(
    backbone=dict(model="mavit_l", drop_path_rate=0.55, pretrained=True),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
