# RetinaNet from scratch on the aerial photographs that deepforest ships: minutes on one core.
#   pip download --no-deps deepforest
#   python tools/deepforest_to_coco.py deepforest-*.whl data/deepforest
# Trees are about 40 pixels large, many of them half of that: photographs are magnified by 1.5,
# which makes them as large as the anchors of mmdet's RetinaNet. The tiles of one photograph, of
# another place than all others, are held out. Result: benchmarks/accounts/trees.md.
_base_ = [
    "./_base_/models/retinanet.py",
    "./_base_/schedules/sample.py",
]
norm = dict(type="GN", num_groups=8)
model = dict(
    backbone=dict(model="test_ravlt", out_norms=True, out_indices=(1, 2, 3)),
    neck=dict(in_channels=[48, 64, 96], start_level=0, out_channels=64, norm_cfg=norm),
    bbox_head=dict(num_classes=1, in_channels=64, feat_channels=64, stacked_convs=2, norm_cfg=norm),
    # parts of trees at the border of a tile are neither found nor missed
    train_cfg=dict(assigner=dict(ignore_iof_thr=0.5)),
)
data_root = "data/deepforest/"
metainfo = dict(classes=("tree",))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="RandomChoice",
        transforms=[[dict(type="Resize", scale_factor=scale)] for scale in (1.2, 1.5, 1.8)],
    ),
    dict(type="RandomCrop", crop_size=(320, 320), allow_negative_crop=True),
    dict(
        type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]
    ),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale_factor=1.5),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
dataset = dict(
    type="CocoDataset", data_root=data_root, metainfo=metainfo, data_prefix=dict(img="images/")
)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **dataset,
        ann_file="annotations/instances_train.json",
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        ann_file="annotations/instances_val.json",
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="CocoMetric", ann_file=data_root + "annotations/instances_val.json", metric="bbox"
)
test_evaluator = val_evaluator
max_iters = 1200
train_cfg = dict(max_iters=max_iters, val_interval=300)
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=50, end=max_iters),
]
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(interval=300))
log_processor = dict(window_size=50)
