_base_ = "./mask-rcnn_inline-pvt-tiny_fpn_1x_coco.py"
model = dict(
    backbone=dict(model="inline_pvt_medium", drop_path_rate=0.3),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
