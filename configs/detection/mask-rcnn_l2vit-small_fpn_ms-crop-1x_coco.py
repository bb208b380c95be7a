_base_ = "./mask-rcnn_l2vit-tiny_fpn_ms-crop-1x_coco.py"
model = dict(
    backbone=dict(model="l2vit_small", drop_path_rate=0.1),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
