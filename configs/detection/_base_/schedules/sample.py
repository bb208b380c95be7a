# Minutes on one core: as few iterations as learning a handful of photographs by heart takes.
_base_ = "mmdet::_base_/default_runtime.py"
max_iters = 120
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.01),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=10),
    dict(type="CosineAnnealingLR", eta_min=2e-5, by_epoch=False, begin=10, end=max_iters),
]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=10),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=40, max_keep_ckpts=2),
)
log_processor = dict(type="LogProcessor", window_size=10, by_epoch=False)
randomness = dict(seed=0)
