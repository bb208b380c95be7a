_base_ = "./mask-rcnn_ravlt-s_fpn_ms-crop-3x_coco.py"
model = dict(
    backbone=dict(model="ravlt_b", drop_path_rate=0.4),
    neck=dict(in_channels=[96, 192, 384, 512]),
)
