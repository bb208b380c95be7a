"""Backbones registered with timm; one family per file."""

from .inline_cswin import InLineCSwin
from .inline_deit import InLineDeiT
from .inline_pvt import InLinePVT
from .inline_swin import InLineSwin
from .l2vit import L2ViT
from .lightnet import LightNet
from .linear_deit import LinearDeiT
from .mavit import MAViT
from .nalaformer import NaLaFormer
from .ravlt import RAVLT

__all__ = [
    "RAVLT",
    "InLineCSwin",
    "InLineDeiT",
    "InLinePVT",
    "InLineSwin",
    "L2ViT",
    "LightNet",
    "LinearDeiT",
    "MAViT",
    "NaLaFormer",
]
