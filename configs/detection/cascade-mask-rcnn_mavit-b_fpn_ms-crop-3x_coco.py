_base_ = "./cascade-mask-rcnn_mavit-s_fpn_ms-crop-3x_coco.py"
model = dict(
    backbone=dict(model="mavit_b", drop_path_rate=0.4, pretrained=True),
    neck=dict(in_channels=[96, 192, 384, 512]),
)
