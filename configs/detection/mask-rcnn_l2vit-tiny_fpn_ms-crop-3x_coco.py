# L2ViT, Mask R-CNN 3x: the authors' configuration, github.com/ChuanyangZheng/L2ViT at fad0341,
# object_detection/configs/L2ViT. 1x too is trained at many scales. No rules by parameter, no mixed
# precision; batch norms of the backbone are trained, each GPU on its own; a layer norm is on each
# map that is used. Not stated: the number of GPUs; results (they stand in the paper alone); which
# weights L2ViT-B starts from (here those of ImageNet-1K).
_base_ = [
    "./_base_/models/mask-rcnn.py",
    "./_base_/datasets/coco_instance_ms-crop.py",
    "./_base_/schedules/adamw_3x.py",
    "mmdet::_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        model="l2vit_tiny",
        out_norms=True,
        out_norm_eps=1e-5,
        pretrained=True,
        drop_path_rate=0.2,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
