_base_ = "./upernet_pola-swin-tiny_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model="pola_swin_small", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
