_base_ = "./upernet_lightnet-tiny_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model="lightnet_small", drop_path_rate=0.1),
    decode_head=dict(in_channels=[96, 192, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
