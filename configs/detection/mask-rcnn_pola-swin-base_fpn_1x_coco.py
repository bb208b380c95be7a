_base_ = "./mask-rcnn_pola-swin-tiny_fpn_1x_coco.py"
model = dict(
    backbone=dict(model="pola_swin_base", drop_path_rate=0.3),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
