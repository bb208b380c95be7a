# The photographs that tools/sample_dense_data.py writes, in the layout of ADE20K, 256 pixels large.
# Training and testing see the same five: what is measured is whether a segmentor can learn them by
# heart. images/validation and annotations/validation have two others.
data_root = "data/sample/ade"
metainfo = dict(
    classes=("background", "person", "cat", "cup", "spoon", "coin", "rocket"),
    palette=[
        [120, 120, 120],
        [220, 20, 60],
        [0, 160, 0],
        [60, 60, 220],
        [250, 170, 30],
        [200, 0, 200],
        [0, 200, 200],
    ],
)
resize = dict(type="Resize", scale=(256, 256), keep_ratio=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    resize,
    dict(type="PackSegInputs"),
]
# Annotations come after Resize: predictions are compared at the size of the photograph.
test_pipeline = [
    dict(type="LoadImageFromFile"),
    resize,
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
dataset = dict(
    type="BaseSegDataset",
    data_root=data_root,
    metainfo=metainfo,
    reduce_zero_label=True,
    data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
)
train_dataloader = dict(
    batch_size=5,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(**dataset, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(**dataset, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
