_base_ = "./mask-rcnn_lightnet-tiny_fpn_1x_coco.py"
model = dict(
    backbone=dict(model="lightnet_base", drop_path_rate=0.3),
    neck=dict(in_channels=[192, 384, 768, 768]),
)
