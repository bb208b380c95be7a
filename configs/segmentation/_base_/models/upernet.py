# mmseg's UperNet with a backbone of ours, for the 150 classes of ADE20K: a config gives
# backbone.model, decode_head.in_channels and, of the third map, auxiliary_head.in_channels.
# mmengine would look `mmseg::` up as a distribution called mmsegmentation, which
# onedl-mmsegmentation is not, so the path is made from the module.
_base_ = __import__("mmseg").__path__[0] + "/.mim/configs/_base_/models/upernet_swin.py"
custom_imports = dict(imports=["vitlinear.segmentation"], allow_failed_imports=False)
data_preprocessor = dict(type="vitlinear.SegDataPreProcessor", size=(512, 512))
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        _delete_=True,
        type="vitlinear.Backbone",
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
        norm_eval=False,
    ),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
