# UperNet: AdamW for 160,000 iterations of 8 x 2 images, linear warm-up of 1,500 iterations from a
# millionth of the rate, then linear decay to 0. Why `_base_` is made so: ../models/upernet.py.
_base_ = __import__("mmseg").__path__[0] + "/.mim/configs/_base_/schedules/schedule_160k.py"
optimizer = dict(_delete_=True, type="AdamW", lr=0.00006, betas=(0.9, 0.999), weight_decay=0.01)
optim_wrapper = dict(optimizer=optimizer)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=160000, by_epoch=False),
]
train_cfg = dict(val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000, save_best="mIoU"))
auto_scale_lr = dict(enable=False, base_batch_size=16)
