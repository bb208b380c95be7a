# COCO with masks at many scales, as DETR and Swin train (mmdet's `ms-crop`): half of the images at
# a short side of 480 to 800, half at 400, 500 or 600, cropped, and then at 480 to 800.
_base_ = "mmdet::_base_/datasets/coco_instance.py"
many_scales = dict(
    type="RandomChoiceResize",
    scales=[(side, 1333) for side in range(480, 801, 32)],
    keep_ratio=True,
)
train_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        transforms=[
            [many_scales],
            [
                dict(
                    type="RandomChoiceResize",
                    scales=[(400, 1333), (500, 1333), (600, 1333)],
                    keep_ratio=True,
                ),
                dict(
                    type="RandomCrop",
                    crop_type="absolute_range",
                    crop_size=(384, 600),
                    allow_negative_crop=True,
                ),
                many_scales,
            ],
        ],
    ),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
