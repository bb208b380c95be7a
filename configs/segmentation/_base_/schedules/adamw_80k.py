# Semantic FPN: AdamW for 80,000 iterations of 8 x 2 images, polynomial decay of power 0.9 down to
# 1e-6, no warm-up, no rules by parameter. Why `_base_` is made so: ../models/upernet.py.
_base_ = __import__("mmseg").__path__[0] + "/.mim/configs/_base_/schedules/schedule_80k.py"
optimizer = dict(_delete_=True, type="AdamW", lr=0.0001, weight_decay=0.0001)
optim_wrapper = dict(optimizer=optimizer)
param_scheduler = [dict(type="PolyLR", eta_min=1e-6, power=0.9, begin=0, end=80000, by_epoch=False)]
train_cfg = dict(val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
auto_scale_lr = dict(enable=False, base_batch_size=16)
