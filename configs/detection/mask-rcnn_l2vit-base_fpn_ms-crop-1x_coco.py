_base_ = "./mask-rcnn_l2vit-tiny_fpn_ms-crop-1x_coco.py"
model = dict(
    backbone=dict(model="l2vit_base", drop_path_rate=0.2),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
