"""Vision backbones with linear attention, registered with timm."""

__version__ = "0.1.0"
