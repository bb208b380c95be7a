# mmseg's Semantic FPN with a backbone of ours, for the 150 classes of ADE20K: a config gives
# backbone.model and neck.in_channels. Why `_base_` is made so: upernet.py.
_base_ = __import__("mmseg").__path__[0] + "/.mim/configs/_base_/models/fpn_r50.py"
custom_imports = dict(imports=["vitlinear.segmentation"], allow_failed_imports=False)
data_preprocessor = dict(type="vitlinear.SegDataPreProcessor", size=(512, 512))
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="vitlinear.Backbone",
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
        norm_eval=False,
    ),
    decode_head=dict(num_classes=150),
)
