_base_ = "./mask-rcnn_h-vittt-tiny_fpn_ms-crop-3x_coco.py"
model = dict(
    backbone=dict(model="h_vittt_base", drop_path_rate=0.6),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
