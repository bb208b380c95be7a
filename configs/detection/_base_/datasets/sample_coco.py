# The photographs that tools/sample_dense_data.py writes, 256 pixels large, without masks. Training
# and testing see the same five: what is measured is whether a detector can learn them by heart.
# annotations/instances_val.json has two others.
data_root = "data/sample/coco/"
metainfo = dict(classes=("person", "cat", "cup", "spoon", "coin", "rocket"))
resize = dict(type="Resize", scale=(256, 256), keep_ratio=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    resize,
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    resize,
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
dataset = dict(
    type="CocoDataset",
    data_root=data_root,
    metainfo=metainfo,
    ann_file="annotations/instances_train.json",
    data_prefix=dict(img="images/"),
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
    dataset=dict(**dataset, pipeline=test_pipeline, test_mode=True),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="CocoMetric", ann_file=data_root + "annotations/instances_train.json", metric="bbox"
)
test_evaluator = val_evaluator
