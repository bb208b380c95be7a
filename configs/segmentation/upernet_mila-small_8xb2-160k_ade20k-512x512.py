_base_ = "./upernet_mila-tiny_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model="mila_small", drop_path_rate=0.3),
)
