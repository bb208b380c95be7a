_base_ = "./mask-rcnn_h-vittt-tiny_fpn_ms-crop-1x_coco.py"
model = dict(
    backbone=dict(model="h_vittt_base"),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
