# mmdet's Cascade Mask R-CNN with a backbone of ours: a config gives backbone.model and
# neck.in_channels. Its box heads are those that Swin made common: four convolutions with SyncBN
# and one linear layer, boxes by class, GIoU loss of weight 10 on decoded boxes. Stages weigh 1,
# 0.5 and 0.25; the RPN has the smooth L1 loss with beta 1/9 (both mmdet's own).
_base_ = "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py"
custom_imports = dict(imports=["vitlinear.detection"], allow_failed_imports=False)
box_head = dict(
    type="ConvFCBBoxHead",
    num_shared_convs=4,
    num_shared_fcs=1,
    in_channels=256,
    conv_out_channels=256,
    fc_out_channels=1024,
    roi_feat_size=7,
    num_classes=80,
    reg_class_agnostic=False,
    reg_decoded_bbox=True,
    norm_cfg=dict(type="SyncBN", requires_grad=True),
    loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
)
model = dict(
    data_preprocessor=dict(type="vitlinear.DetDataPreprocessor"),
    backbone=dict(
        _delete_=True,
        type="vitlinear.Backbone",
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
        norm_eval=False,
    ),
    roi_head=dict(
        bbox_head=[
            dict(
                **box_head,
                bbox_coder=dict(
                    type="DeltaXYWHBBoxCoder",
                    target_means=[0.0, 0.0, 0.0, 0.0],
                    target_stds=[center, center, size, size],
                ),
            )
            for center, size in ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))
        ]
    ),
)
