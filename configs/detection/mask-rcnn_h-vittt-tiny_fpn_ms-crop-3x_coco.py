# H-ViT³, Mask R-CNN 3x: as 1x, for 36 epochs and with more drop path. The authors' configuration,
# github.com/LeapLabTHU/ViTTT at e347758, detection/.
_base_ = "./mask-rcnn_h-vittt-tiny_fpn_ms-crop-1x_coco.py"
train_cfg = dict(max_epochs=36)
model = dict(backbone=dict(model="h_vittt_tiny", drop_path_rate=0.3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
