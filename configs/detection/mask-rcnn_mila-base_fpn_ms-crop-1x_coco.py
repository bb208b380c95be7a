_base_ = "./mask-rcnn_mila-tiny_fpn_ms-crop-1x_coco.py"
model = dict(
    backbone=dict(model="mila_base"),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
