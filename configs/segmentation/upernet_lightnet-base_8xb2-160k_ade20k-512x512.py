_base_ = "./upernet_lightnet-tiny_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model="lightnet_base", drop_path_rate=0.3),
    decode_head=dict(in_channels=[192, 384, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
