_base_ = "./retinanet_ravlt-t_fpn_1x_coco.py"
model = dict(
    backbone=dict(model="ravlt_b", drop_path_rate=0.4),
    neck=dict(in_channels=[96, 192, 384, 512]),
)
