_base_ = "./mask-rcnn_h-vittt-tiny_fpn_ms-crop-3x_coco.py"
model = dict(
    backbone=dict(model="h_vittt_small", drop_path_rate=0.4),
)
