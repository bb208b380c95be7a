_base_ = "./mask-rcnn_h-vittt-tiny_fpn_ms-crop-1x_coco.py"
model = dict(
    backbone=dict(model="h_vittt_small"),
)
