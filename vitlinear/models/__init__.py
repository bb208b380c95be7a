"""Backbones registered with timm; one family per file."""

from .l2vit import L2ViT
from .mavit import MAViT
from .nalaformer import NaLaFormer
from .ravlt import RAVLT

__all__ = [
    "RAVLT",
    "L2ViT",
    "MAViT",
    "NaLaFormer",
]
