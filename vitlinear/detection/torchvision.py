"""The name under which torchvision's detectors are documented; `vitlinear.dense.torchvision`."""

from vitlinear.dense.torchvision import BackboneWithFPN, fpn_backbone, mask_padding

__all__ = ["BackboneWithFPN", "fpn_backbone", "mask_padding"]
