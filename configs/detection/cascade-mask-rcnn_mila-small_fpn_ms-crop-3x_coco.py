_base_ = "./cascade-mask-rcnn_mila-tiny_fpn_ms-crop-3x_coco.py"
model = dict(
    backbone=dict(model="mila_small"),
)
