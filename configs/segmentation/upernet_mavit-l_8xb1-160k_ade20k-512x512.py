# One image a GPU, as the authors have it.
_base_ = "./upernet_mavit-t_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model="mavit_l", drop_path_rate=0.55, pretrained=True),
    decode_head=dict(in_channels=[96, 192, 448, 640]),
    auxiliary_head=dict(in_channels=448),
)
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(base_batch_size=8)
