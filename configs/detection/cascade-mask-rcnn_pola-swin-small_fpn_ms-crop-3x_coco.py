_base_ = "./cascade-mask-rcnn_pola-swin-tiny_fpn_ms-crop-3x_coco.py"
model = dict(
    backbone=dict(model="pola_swin_small", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
