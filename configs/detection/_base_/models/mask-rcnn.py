# mmdet's Mask R-CNN with a backbone of ours: a config gives backbone.model and neck.in_channels.
_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"
custom_imports = dict(imports=["vitlinear.detection"], allow_failed_imports=False)
model = dict(
    data_preprocessor=dict(type="vitlinear.DetDataPreprocessor"),
    backbone=dict(
        _delete_=True,
        type="vitlinear.Backbone",
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
        norm_eval=False,
    ),
)
