# One image a GPU, half of the learning rate, as the authors have it.
_base_ = "./mask-rcnn_mavit-s_fpn_ms-crop-3x_coco.py"
model = dict(
    backbone=dict(model="mavit_l", drop_path_rate=0.55, pretrained=True),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
optim_wrapper = dict(optimizer=dict(lr=0.0002))
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(base_batch_size=8)
