_base_ = "./upernet_h-vittt-small_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model="h_vittt_base", drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 448, 640]),
    auxiliary_head=dict(in_channels=448),
)
