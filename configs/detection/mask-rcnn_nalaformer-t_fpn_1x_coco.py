_base_ = "./mask-rcnn_nalaformer-xt_fpn_1x_coco.py"
model = dict(
    backbone=dict(model="nalaformer_t", drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
