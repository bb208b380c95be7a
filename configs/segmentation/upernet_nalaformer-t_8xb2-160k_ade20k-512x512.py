_base_ = "./upernet_nalaformer-xt_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model="nalaformer_t", drop_path_rate=0.1),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
