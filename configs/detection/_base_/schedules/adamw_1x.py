# AdamW for 12 epochs. Linear warm-up of 500 iterations from a thousandth of the rate and steps at
# epochs 8 and 11 are mmdet's. auto_scale_lr.base_batch_size 16 is mmdet's too, and assumes 8 GPUs:
# no family states how many it trained on.
_base_ = "mmdet::_base_/schedules/schedule_1x.py"
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=0.0001, betas=(0.9, 0.999), weight_decay=0.05)
)
