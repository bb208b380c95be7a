# One image a GPU, at the learning rate of two, as the authors have it.
_base_ = "./mask-rcnn_ravlt-s_fpn_ms-crop-3x_coco.py"
model = dict(
    backbone=dict(model="ravlt_l", drop_path_rate=0.55),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(base_batch_size=8)
